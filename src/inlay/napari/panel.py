"""The panel of the plug-in: choose an adapter and a scan, place points, see the mask follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import napari
import numpy as np
import pandas
from magicgui.widgets import CheckBox, ComboBox, Container, FileEdit, PushButton
from napari.layers import Image, Labels, Points
from napari.qt.threading import create_worker
from napari.utils import DirectLabelColormap
from napari.utils.notifications import show_error, show_info
from qtpy.QtWidgets import QFileDialog

from inlay.adapters.load import load_adapter
from inlay.errors import InlayError
from inlay.napari.layers import (
    FEATURE,
    NEGATIVE,
    WORLDS,
    LayerSession,
    choose_colours,
    find_transform,
    read_clicks,
)
from inlay.tasks.adapter import Adapter, check_task

BEST = "the best there is"
CHANGES = ("added", "removed", "changed")  # of points, once they are done


class SegmentPanel(Container):
    """Segments an image layer with an adapter, and follows a layer of points.

    Args:
        napari_viewer: Whose layers it works on.
    """

    def __init__(self, napari_viewer: napari.viewer.Viewer) -> None:
        self._viewer = napari_viewer
        self._adapter: Adapter | None = None
        self._session: LayerSession | None = None
        self._points_layer: Points | None = None
        self._mask_layer: Labels | None = None
        self._others: list[ComboBox] = []  # of further channels
        self._is_busy, self._is_stale = False, False
        self._folder = FileEdit(mode="d", label="Adapter", tooltip="A folder, or a Hub id")
        self._device = ComboBox(choices=[BEST, "cpu", "cuda", "mps"], label="Device")
        self._load_button = PushButton(text="Load the adapter")
        self._scan = ComboBox(choices=self._list_images, label="Scan")
        self._world = ComboBox(
            choices=list(WORLDS),
            label="World",
            tooltip="How the axes of a layer that inlay has not opened grow: LPS, as ITK and DICOM have it, or RAS",
        )
        self._new_class = ComboBox(choices=self._list_classes, label="New points are")
        self._live = CheckBox(value=True, text="Follow each point")
        self._undo_button = PushButton(text="Undo the last point")
        self._largest = CheckBox(value=False, text="Only each class's largest component")
        self._all_button = PushButton(text="Segment the whole scan")
        self._save_button = PushButton(text="Save the mask …")
        widgets = [
            self._folder,
            self._device,
            self._load_button,
            self._scan,
            self._world,
            self._new_class,
            self._live,
            self._undo_button,
            self._largest,
            self._all_button,
            self._save_button,
        ]
        super().__init__(widgets=widgets)
        for event in (napari_viewer.layers.events.inserted, napari_viewer.layers.events.removed):
            event.connect(self._list_again)
        self._load_button.changed.connect(self.load)
        self._new_class.changed.connect(self._choose_label)
        self._undo_button.changed.connect(self.undo)
        self._all_button.changed.connect(self.segment_all)
        self._save_button.changed.connect(self._ask_and_save)

    @property
    def is_busy(self) -> bool:
        """Whether something is being computed."""
        return self._is_busy

    def load(self) -> None:
        """Load the adapter, and make a layer for points of its classes."""
        path, device = str(self._folder.value), self._device.value

        def work() -> Adapter:
            adapter = load_adapter(path, device=None if device == BEST else device)
            check_task(adapter, "volume-segmentation")
            return adapter

        self._run(work, self._take_adapter)

    def segment_all(self) -> None:
        """Segment the whole scan, with all points as prompts."""
        largest = self._largest.value
        self._compute(lambda session, clicks, _: session.segment_all(clicks, largest=largest))

    def follow(self) -> None:
        """Bring the mask up to date with the points."""
        self._compute(lambda session, clicks, painted: session.follow(clicks, painted))

    def undo(self) -> None:
        """Remove the last point."""
        if self._points_layer is not None and len(self._points_layer.data):
            self._points_layer.selected_data = {len(self._points_layer.data) - 1}
            self._points_layer.remove_selected()

    def save(self, path: str | Path) -> None:
        """Write the mask, with what was painted over it."""
        if self._session is None or self._mask_layer is None:
            show_error("there is no mask yet; segment the scan.")
            return
        try:
            show_info(f"saved {self._session.save(self._mask_layer.data, path)}")
        except InlayError as error:
            show_error(str(error))

    def _list_images(self, widget: ComboBox) -> list[Image]:
        return [layer for layer in self._viewer.layers if isinstance(layer, Image)]

    def _list_classes(self, widget: ComboBox) -> list[str]:
        return [] if self._adapter is None else [*self._adapter.labels, NEGATIVE]

    def _list_again(self) -> None:
        for box in (self._scan, *self._others):
            box.reset_choices()

    def _take_adapter(self, adapter: Adapter) -> None:
        self._adapter, self._session = adapter, None
        for box in self._others:
            self.remove(box)
        channels = adapter.processor.channels
        self._scan.label = "Scan" if len(channels) == 1 else channels[0]
        self._others = [ComboBox(choices=self._list_images, label=name) for name in channels[1:]]
        for place, box in enumerate(self._others, start=self.index(self._scan) + 1):
            self.insert(place, box)
        labels = list(adapter.labels)
        colours = choose_colours(dict(enumerate(labels, start=1)))
        self._new_class.reset_choices()
        if self._points_layer is not None and self._points_layer in self._viewer.layers:
            self._viewer.layers.remove(self._points_layer)
        names = [*labels, NEGATIVE]
        self._points_layer = self._viewer.add_points(
            np.zeros((0, 3)),
            ndim=3,
            name="points",
            features=pandas.DataFrame({FEATURE: pandas.Categorical([], categories=names)}),
            feature_defaults={FEATURE: labels[0]},
            face_color=FEATURE,
            face_color_cycle={name: colours[name] for name in names},
            border_color="black",
            size=3,
            units=self._viewer.layers[-1].units if len(self._viewer.layers) else None,
        )
        self._new_class.value = labels[0]
        self._points_layer.events.data.connect(self._points_changed)
        self._points_layer.mode = "add"

    def _choose_label(self, label: str) -> None:
        if self._points_layer is not None and label:
            self._points_layer.feature_defaults = {FEATURE: label}

    def _points_changed(self, event: Any) -> None:
        if self._live.value and event.action in CHANGES:
            self.follow()

    def _compute(self, work: Callable[[LayerSession, list[Any], np.ndarray | None], np.ndarray]) -> None:
        """Run something of the session with points and mask as they are now, and show the mask that it gives."""
        if self._is_busy:
            self._is_stale = True
            return
        image, world, adapter = self._scan.value, self._world.value, self._adapter
        others = [box.value for box in self._others]
        if adapter is None or image is None or None in others:
            show_error("load an adapter and choose a scan first.")
            return
        known = self._session
        asked = (adapter, image, world, others)
        is_known = known is not None and (known.adapter, known.image, known.world, known.others) == asked
        points = self._points_layer
        clicks = [] if points is None else read_clicks(points, image, points.features[FEATURE].tolist())
        painted = (
            None if self._mask_layer is None or not (is_known and self._has_mask()) else np.array(self._mask_layer.data)
        )

        def run() -> tuple[LayerSession, np.ndarray]:
            session = known if is_known and known is not None else LayerSession(adapter, image, world, others)
            return session, work(session, clicks, painted)

        self._run(run, self._show)

    def _show(self, found: tuple[LayerSession, np.ndarray]) -> None:
        self._session, mask = found
        if self._mask_layer is not None and self._has_mask() and self._mask_layer.data.shape == mask.shape:
            self._mask_layer.data = mask
            return
        names, image = self._session.names, self._session.image
        colours = choose_colours(names)
        shown: dict[int | None, tuple[float, ...]] = {k: (*colours[name], 1.0) for k, name in names.items()}
        self._mask_layer = self._viewer.add_labels(
            mask,
            name=f"{image.name} mask",
            affine=find_transform(image),
            units=image.units,
            opacity=0.5,
            colormap=DirectLabelColormap(color_dict={None: (0, 0, 0, 0), 0: (0, 0, 0, 0), **shown}),
            features=pandas.DataFrame({"index": [0, *names], FEATURE: [NEGATIVE, *names.values()]}),
        )
        if self._points_layer is not None and self._points_layer in self._viewer.layers:
            self._viewer.layers.move(len(self._viewer.layers) - 1, self._viewer.layers.index(self._points_layer))
            self._viewer.layers.selection.active = self._points_layer

    def _has_mask(self) -> bool:
        """Whether the layer of the mask is still there."""
        return self._mask_layer is not None and self._mask_layer in self._viewer.layers

    def _run(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Compute on a thread, so that the window stays alive."""
        self._is_busy = True
        for button in (self._load_button, self._all_button):
            button.enabled = False

        def attempt() -> tuple[Any, InlayError | None]:
            try:
                return work(), None
            except InlayError as error:  # what is wrong with the input; all else is napari's to show
                return None, error

        def take(found: tuple[Any, InlayError | None]) -> None:
            result, error = found
            if error is None:
                done(result)
            else:
                show_error(str(error))

        worker = create_worker(attempt)
        worker.returned.connect(take)
        worker.finished.connect(self._rest)
        worker.start()

    def _rest(self) -> None:
        self._is_busy = False
        for button in (self._load_button, self._all_button):
            button.enabled = True
        if self._is_stale:
            self._is_stale = False
            self.follow()

    def _ask_and_save(self) -> None:
        path, _ = QFileDialog.getSaveFileName(self.native, "Save the mask", "mask.nii.gz", "NIfTI (*.nii.gz *.nii)")
        if path:
            self.save(path)
