"""Masks of DICOM series as DICOM Segmentation, a file that viewers of hospitals show over the series.

The file names the patient and the study: the standard takes them from the series that the mask is of.

Source: DICOM PS3.3, A.51 (segmentation) and C.8.20; highdicom (Bridge et al. 2022, doi 10.1007/s10278-022-00683-y).
"""

import warnings
from collections.abc import Sequence
from importlib.metadata import version as find_version
from pathlib import Path
from typing import Any

import numpy as np

from inlay.errors import BadInput, Unsupported
from inlay.tasks.volumes.dicom import TAGS, find_stack, is_dicom

SEG = (".dcm",)
# What the standard wants copied, and may be empty; programs that remove names remove these fields whole.
COPIED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex",
    "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip
# What else highdicom reads of the series; comments, institutions and all other fields stay where they are.
REFERRED = (
    "SOPClassUID", "StudyInstanceUID", "FrameOfReferenceUID", "PositionReferenceIndicator", "SpecificCharacterSet",
    "SpacingBetweenSlices", *TAGS,
)  # fmt: skip
LONGEST_LABEL = 64  # characters of a segment's name
SERIES_NUMBER = 900  # of the new series in its study: behind those of the scanner


def import_highdicom() -> Any:
    """highdicom, or an InlayError that says how to get it."""
    try:
        import highdicom
    except ImportError:
        raise Unsupported(
            "DICOM segmentations take highdicom, which is not installed; run: pip install 'inlay[formats]'"
        ) from None
    return highdicom


def check_dicom_seg(path: Path, scan: Path | None) -> None:
    """Raise InlayError unless a segmentation of a scan can be written to a path: before all the work.

    Args:
        path: Of the segmentation.
        scan: A file, or the folder of a series; None: there is none.

    Raises:
        InlayError: The scan is no DICOM, another DICOM file is there already, or highdicom is not installed.
    """
    if scan is None or not is_dicom(scan):
        name = "the scan" if scan is None else f"'{scan}'"
        raise BadInput(
            f"'{path}' would be a DICOM segmentation, which belongs to a DICOM series, and {name} is none; give a "
            "name that ends with .nii.gz or another format."
        )
    import_highdicom()
    if path.is_file() and not _is_segmentation(path):
        raise BadInput(f"'{path}' is there and no segmentation, perhaps a slice of a scan; give another name.")


def write_dicom_seg(path: Path, mask: np.ndarray, scan: Path, labels: Sequence[str]) -> None:
    """Save a mask as DICOM Segmentation: a segment for each class on the slices of the series, but for empty ones.

    Segments are coded as tissue, as 3D Slicer does where it knows no more; their names say what they are.

    Args:
        path: Of the new file.
        mask: (X, Y, Z) as `read_dicom` orders the series, k for class k.
        scan: A folder with the series, or one of its files.
        labels: Names of the classes 1..K.

    Raises:
        InlayError: The series cannot be read again, or lacks what a segmentation must refer to.
    """
    from pydicom import dcmread
    from pydicom.sr.codedict import codes

    library = import_highdicom()
    planes, _ = find_stack(scan)
    files = list(dict.fromkeys(plane.file for plane in planes))
    if 1 < len(files) < len(planes):
        raise Unsupported(f"'{scan}' has its slices in several files of many frames; save the mask as .nii.gz.")
    frames = np.argsort([plane.frame for plane in planes], kind="stable")  # as the file or the files have them
    version = find_version("inlay")
    algorithm = library.AlgorithmIdentificationSequence("inlay", codes.DCM.ArtificialIntelligence, version)
    segments = [
        library.seg.SegmentDescription(
            segment_number=k,
            segment_label=label.replace("\\", "/")[:LONGEST_LABEL],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=library.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for k, label in enumerate(labels, start=1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values in the series that break the standard
        slices = [dcmread(file, stop_before_pixels=True, specific_tags=[*REFERRED, *COPIED]) for file in files]
        for slice_ in slices:
            for name in COPIED:
                if name not in slice_:
                    setattr(slice_, name, "")
        try:
            made = library.seg.Segmentation(
                source_images=slices,
                pixel_array=np.ascontiguousarray(mask.transpose(2, 1, 0)[frames]),
                segmentation_type=library.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=library.UID(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=library.UID(),
                instance_number=1,
                manufacturer="inlay",
                manufacturer_model_name="inlay",
                software_versions=version,
                device_serial_number="none",
                series_description="Segmentation by inlay",
                specific_character_set="ISO_IR 192",  # UTF-8, for the names of classes
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = str(error).splitlines()[0].rstrip(".")
            raise Unsupported(
                f"'{scan}' lacks what a DICOM segmentation refers to: {said}; save the mask as .nii.gz."
            ) from error
        made.save_as(path)


def _is_segmentation(path: Path) -> bool:
    from pydicom import dcmread

    try:
        return bool(dcmread(path, stop_before_pixels=True, specific_tags=["Modality"]).get("Modality") == "SEG")
    except Exception:  # pydicom raises what it pleases for what is no DICOM
        return False
