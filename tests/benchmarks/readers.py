"""Grey single-frame DICOM files read by this project, by SimpleITK and by plain pydicom: who reads which, and alike.

    .venv-benchmarks/bin/python -m tests.benchmarks.readers [FOLDER ...] [--all]

Without folders: the test files inside the packages pydicom and pydicom-data. Values after rescaling are compared, as SimpleITK returns them; then the 8-bit grey with what pydicom's own
modality and VOI functions give. Each reader runs in a process of its own: SimpleITK carries a gdcm that must not meet
another.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 64_000_000
OURS, ITK, PYDICOM = READERS = ("pneumo_dist", "SimpleITK", "pydicom")


def candidates(folders: list[Path]) -> list[Path]:
    """Return the files whose header says: one frame, one grey sample of 8 to 16 bits, pixel data present."""
    import pydicom

    found = []
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        try:
            film = pydicom.dcmread(path, force=path.suffix.lower() == ".dcm")
            grey = film.PhotometricInterpretation.startswith("MONOCHROME") and film.get("SamplesPerPixel", 1) == 1
            depth = film.BitsAllocated in (8, 16) and film.get("BitsStored", 8) >= 8
            if grey and depth and int(film.get("NumberOfFrames") or 1) == 1 and "PixelData" in film:
                found.append(path)
        except Exception:  # no DICOM, or no image
            continue
    return found


def read_ours(path: Path) -> tuple[np.ndarray, Any]:
    """Return (values after rescaling, (8-bit grey or the reason, warnings))."""
    from pneumo_dist.data.films import dicom, grey, stored

    dataset, _ = dicom._parse(path.read_bytes(), LIMIT)
    photometric = dicom._photometric(dataset, 1, [])
    pixels = stored.stored_values(dataset, stored.matrix_of(dataset, 1, photometric, LIMIT), LIMIT, [])
    patterns = np.arange(1 << pixels.bits)
    negative = pixels.signed & (patterns >> (pixels.bits - 1) > 0)
    values = np.where(negative, patterns - (1 << pixels.bits), patterns)
    shown, _ = grey._modality(dataset, values, pixels.signed, pixels.bits)
    try:
        film = dicom.read_film(path)
        return shown[pixels.patterns], (film.pixels, film.warnings)
    except dicom.FilmError as error:
        return shown[pixels.patterns], (str(error), ())


def read_itk(path: Path) -> tuple[np.ndarray, Any]:
    """Return (values after rescaling, None); SimpleITK's inversion of MONOCHROME1 is undone."""
    import pydicom
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    values = values.reshape(values.shape[-2:])
    film = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    if film.PhotometricInterpretation == "MONOCHROME1":
        slope, intercept = float(film.get("RescaleSlope") or 1), float(film.get("RescaleIntercept") or 0)
        values = 2 * intercept + slope * (2**film.BitsStored - 1) - values.astype(float)
    return values, None


def read_pydicom(path: Path) -> tuple[np.ndarray, Any]:
    """Return (values after rescaling, 8-bit grey by pydicom's functions, or None where it has none)."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    film = pydicom.dcmread(path, force=True)
    values = apply_modality_lut(film.pixel_array, film)
    try:
        shown = apply_voi_lut(values, film).astype(float)
    except Exception:  # damaged windows and LUTs
        return values, None
    if film.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** film.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif film.get("WindowWidth") not in (None, ""):
        width = film.WindowWidth if isinstance(film.WindowWidth, (int, float)) else film.WindowWidth[0]
        centre = film.WindowCenter if isinstance(film.WindowCenter, (int, float)) else film.WindowCenter[0]
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
        shown = values.astype(float)
    elif film.BitsStored == 8 and not any(name in film for name in ("RescaleSlope", "ModalityLUTSequence")):
        low, high = (-128.0, 127.0) if film.PixelRepresentation else (0.0, 255.0)
    else:
        low, high = shown.min(), shown.max()
    grey = np.floor(np.clip((shown - low) / max(high - low, 1e-9), 0, 1) * 255 + 0.5)
    return values, 255 - grey if film.PhotometricInterpretation == "MONOCHROME1" else grey


def one_reader(reader: str, paths: list[Path]) -> list[Any]:
    """Read the files in this process; a failure is its text."""
    warnings.simplefilter("ignore")
    read = dict(zip(READERS, (read_ours, read_itk, read_pydicom), strict=True))[reader]
    results = []
    for path in paths:
        try:
            results.append(read(path))
        except Exception as error:
            results.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return results


def in_process(reader: str, paths: list[Path]) -> list[Any]:
    """Read the files in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results"
        command = [sys.executable, "-m", "tests.benchmarks.readers", "--reader", reader, "--out", str(out)]
        subprocess.run([*command, *map(str, paths)], check=True, stderr=subprocess.DEVNULL)
        return list(pickle.loads(out.read_bytes()))


def alike(one: Any, other: Any) -> bool:
    """Tell whether both readers returned the same values."""
    if isinstance(one, str) or isinstance(other, str) or one[0].shape != other[0].shape:
        return False
    return bool(np.allclose(one[0].astype(float), other[0].astype(float), rtol=1e-6, atol=1e-3))


def compare(paths: list[Path], verbose: bool) -> None:
    """Print the counts, and every file that is not read or differs."""
    ours, itk, plain = (in_process(reader, paths) for reader in READERS)
    counts: Counter[str] = Counter()
    for path, mine, second, third in zip(paths, ours, itk, plain, strict=True):
        notes = []
        for reader, result in zip(READERS, (mine, second, third), strict=True):
            counts[f"read by {reader}"] += not isinstance(result, str)
        agreed = second if alike(second, third) else None
        counts["SimpleITK and pydicom agree"] += agreed is not None
        if agreed is not None and alike(mine, agreed):
            counts["... and pneumo_dist has their values"] += 1
        elif agreed is not None:
            notes.append(f"we: {mine if isinstance(mine, str) else 'OTHER VALUES'}")
        else:
            same = [n for n, result in ((ITK, second), (PYDICOM, third)) if alike(mine, result)]
            counts["they disagree or one fails: we are as " + (same[0] if same else "neither")] += 1
            text = [
                f"{n} {r if isinstance(r, str) else 'read'}"
                for n, r in zip(READERS, (mine, second, third), strict=True)
            ]
            notes.append(f"as {', '.join(same) or 'neither'}: " + " | ".join(text))
        if not isinstance(mine, str):
            grey, warned = mine[1]
            if isinstance(grey, str):
                counts["read, but not answered: blank"] += 1
                notes.append(grey)
            elif not isinstance(third, str) and third[1] is not None and third[1].shape == grey.shape:
                distance = np.abs(grey - third[1]).max()
                counts[
                    "8-bit grey within one level of pydicom's functions" if distance <= 1 else "8-bit grey differs"
                ] += 1
                notes += [f"grey differs by {distance:.0f}"] if distance > 1 else []
            notes += [f"warning: {text}" for text in warned] if notes or verbose else []
        if notes or verbose:
            print(f"{path.name}: " + "; ".join(notes))
    print(f"\n{len(paths)} grey single-frame files of 8 to 16 bits")
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")


def main() -> int:
    """Compare, or read with one reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="FOLDER", help="folders of DICOM files")
    parser.add_argument("--all", action="store_true", help="print every file with its warnings")
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.reader:
        asked.out.write_bytes(pickle.dumps(one_reader(asked.reader, asked.paths)))
        return 0
    folders = asked.paths
    if not folders:
        import data_store
        import pydicom

        folders = [Path(next(iter(module.__path__))) for module in (pydicom, data_store)]
    compare(candidates(folders), asked.all)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
