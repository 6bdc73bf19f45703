"""Small films, models, runs and tasks for the tests of prediction. Everything is a pure function of its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pneumo_dist.config import Config, load
from pneumo_dist.model.modelfile import save_model
from pneumo_dist.model.unet import ResNet34UNet, normalise
from pneumo_dist.run import Run
from pneumo_dist.runtime.task import Task

PATIENT = "Nobody^Nemo"
SECRET = "PATIENT-0815"


def picture(seed: int, rows: int = 96, columns: int = 80) -> np.ndarray:
    """Return a grey picture with some structure, uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 5), dtype=np.uint8)
    return np.kron(coarse, np.ones((-(-rows // 6), -(-columns // 5)), np.uint8))[:rows, :columns].copy()


def write_dicom(path: Path, pixels: np.ndarray, **attributes: Any) -> Path:
    """Write an uncompressed secondary capture with a patient name that no output may contain."""
    from pydicom.config import disable_value_validation
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    with disable_value_validation():  # an age without a unit is what real films have
        film = Dataset()
        film.file_meta = FileMetaDataset()
        film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        film.SOPClassUID = film.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        film.SOPInstanceUID = film.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
        film.StudyInstanceUID = generate_uid(entropy_srcs=["study", str(path)])
        film.SeriesInstanceUID = generate_uid(entropy_srcs=["series", str(path)])
        film.PatientName, film.PatientID, film.PatientBirthDate, film.PatientSex = PATIENT, SECRET, "19010101", "F"
        film.PatientAge = "58"  # as SIIM-ACR has it: no unit
        film.StudyDate, film.StudyTime, film.StudyID, film.AccessionNumber = "19010101", "000000", "", ""
        film.ReferringPhysicianName, film.Modality, film.ViewPosition = "", "CR", "PA"
        film.Rows, film.Columns = pixels.shape
        film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
        film.BitsAllocated = film.BitsStored = 8
        film.HighBit, film.PixelRepresentation = 7, 0
        film.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
        for name, value in attributes.items():
            setattr(film, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    film.save_as(path, enforce_file_format=True)
    return path


def network(seed: int = 0, images: list[np.ndarray] | None = None, film_head: bool = False) -> ResNet34UNet:
    """Return a random network whose probabilities on `images` spread over 0 to 1 and differ between films and pixels."""
    model = ResNet34UNet(seed, film_head).eval()
    batch = torch.from_numpy(np.stack(images or [picture(100 + i, 32, 32) for i in range(4)]))[:, None]
    with torch.no_grad():
        outputs = zip((model.head, model.film_head), model(normalise(batch)), (-1.0, 0.0), strict=True)
        for layer, logits, centre in outputs:
            if layer is not None:
                scale = 1.5 / float(logits.std())
                layer.weight.mul_(scale)
                layer.bias.fill_(centre - float(logits.mean()) * scale)
    model.lay_out()  # as `load_model` does
    return model


def write_model(
    path: Path,
    seed: int = 0,
    size: int = 32,
    images: list[np.ndarray] | None = None,
    film_head: bool = False,
    **meta: Any,
) -> Path:
    """Write a model file with a random network."""
    meta = {"size": size, "threshold": 0.5, "tta": "hflip", **meta}
    save_model(path, network(seed, images, film_head).state_dict(), meta)
    return path


def task(run_dir: Path, stage: str, overrides: list[str], **position: Any) -> Task:
    """Return a task of a run with the given configuration."""
    config: Config = load(None, ["train.threads=2", "data.workers=2", *overrides])
    run_dir.mkdir(parents=True, exist_ok=True)
    return Task(run=Run(run_dir, config), stage=stage, **position)


def make_shards(run_dir: Path, overrides: list[str]) -> None:
    """Make phantom films and their shards in a run."""
    from pneumo_dist.data import phantom
    from pneumo_dist.data.preprocess import preprocess
    from pneumo_dist.data.preprocess.finalize import finalize

    phantom.run(task(run_dir, "phantom", overrides))
    preprocess.write_shards(task(run_dir, "preprocess", overrides))
    finalize(task(run_dir, "finalize", overrides))
