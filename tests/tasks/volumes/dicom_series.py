"""DICOM series written by pydicom, file by file or as one file of frames."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SECRET = "Doe^Jane"


def new_slice(pixels, kind=CTImageStorage, **tags):
    """A dataset with pixels (rows, columns) or (frames, rows, columns) of int16."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = kind
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = generate_uid()
    made.PatientName, made.PatientID, made.Modality = SECRET, SECRET, "CT"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
    made.SeriesDescription, made.ImageType = "Axial", ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.Rows, made.Columns = pixels.shape[-2:]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.PixelData = np.ascontiguousarray(pixels, "<i2").tobytes()
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def lps(affine):
    """Row and column direction, spacing between rows and columns, and positions of slices of an affine to RAS."""
    affine = np.diag([-1.0, -1, 1, 1]) @ affine
    x, y = affine[:3, 0], affine[:3, 1]
    dx, dy = np.linalg.norm(x), np.linalg.norm(y)
    return [*(x / dx), *(y / dy)], [dy, dx], lambda k: affine[:3, 2] * k + affine[:3, 3]


def write_series(folder, stored, affine, slopes=None, names=None, **tags):
    """Slices of voxels (X, Y, Z), int16, in files whose names and numbers say nothing of their order."""
    folder.mkdir(exist_ok=True, parents=True)
    directions, spacing, place = lps(affine)
    count = stored.shape[2]
    for k in range(count):
        slope, intercept = (1, 0) if slopes is None else slopes[k]
        made = new_slice(
            stored[:, :, k].T, ImagePositionPatient=[f"{v:.6f}" for v in place(k)], PixelSpacing=spacing,
            ImageOrientationPatient=[f"{v:.10f}" for v in directions], InstanceNumber=count - k, SliceThickness=99,
            RescaleSlope=slope, RescaleIntercept=intercept, **tags,
        )  # fmt: skip
        name = names[k] if names else f"{tags.get('SeriesInstanceUID', 'i')}_{k * 7 % 11:02}_{k}"
        made.save_as(folder / name, enforce_file_format=True)
    return folder


def write_frames(path, stored, affine, slope=(1, 0)):
    """One file of the frames of voxels (X, Y, Z), int16."""
    directions, spacing, place = lps(affine)

    def item(**values):
        made = Dataset()
        for name, value in values.items():
            setattr(made, name, value)
        return made

    shared = item(
        PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[f"{v:.10f}" for v in directions])]),
        PixelMeasuresSequence=Sequence([item(PixelSpacing=spacing, SliceThickness=99)]),
        PixelValueTransformationSequence=Sequence([item(RescaleSlope=slope[0], RescaleIntercept=slope[1])]),
    )
    frames = [
        item(PlanePositionSequence=Sequence([item(ImagePositionPatient=[f"{v:.6f}" for v in place(k)])]))
        for k in range(stored.shape[2])
    ]
    made = new_slice(
        stored.transpose(2, 1, 0), EnhancedCTImageStorage, NumberOfFrames=stored.shape[2],
        SharedFunctionalGroupsSequence=Sequence([shared]), PerFrameFunctionalGroupsSequence=Sequence(frames),
    )  # fmt: skip
    made.save_as(path, enforce_file_format=True)
    return path
