"""List the licence of every locked package: `.venv/bin/python tests/licences.py`; exit 1 if one is not accepted.

Accepted are permissive licences and those that oblige only changes of the package itself (MPL). GPL and AGPL are not, nor
is LGPL as a package's own licence; a library under such terms inside a wheel must stand in BUNDLED with the reason.
"""

import re
import sys
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

LOCKS = Path(__file__).resolve().parents[1] / "launch" / "locks"
ACCEPTED = re.compile(r"MIT|BSD|\b0BSD\b|Apache|MPL|Mozilla Public|PSF|Python Software Foundation|Zlib|CC0|BSL|NVIDIA")
REFUSED = re.compile(r"GPL|General Public|Commons Clause|SSPL", re.IGNORECASE)
COPYLEFT = re.compile(r"^\W*GNU (?:LESSER |LIBRARY |AFFERO )?GENERAL PUBLIC LICENSE\s*$", re.MULTILINE)

# Locked for other systems, and therefore not installed everywhere: name pattern -> licence, as the package states it.
ELSEWHERE = {
    "nvidia-*": "NVIDIA proprietary: redistributable, only with the CUDA build of torch",
    "cuda-*": "NVIDIA proprietary or Apache-2.0: redistributable, only with the CUDA build of torch",
    "triton": "MIT: only with the CUDA build of torch",
    "colorama": "BSD-3-Clause: only on Windows",
    "httpx2-jsfetch": "BSD-3-Clause: only in a browser",
}
# Packages whose licence files hold the text of a GNU licence: why they are accepted.
BUNDLED = {
    "numpy": "libgfortran (GPL-3.0 with the GCC Runtime Library Exception: free for any program), libquadmath (LGPL-2.1)",
    "scipy": "libgfortran (GPL-3.0 with the GCC Runtime Library Exception: free for any program), libquadmath (LGPL-2.1)",
    "opencv-python-headless": "FFmpeg, libquadmath (LGPL-2.1) as separate shared libraries, libgfortran (see numpy)",
    "setuptools": "autocommand (LGPL-3.0), a Python module that only the set-up tool itself imports",
    "torch": "text of the tests of cpr (GPL-3.0), which are not in the wheel",
}


def locked() -> dict[str, str]:
    """Return the versions of all locked packages by name; torch's is that of the build for GPUs."""
    texts = [(LOCKS / f"{name}.txt").read_text() for name in ("torch-cuda", "common", "tests")]
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;]+)", "\n".join(texts), re.MULTILINE))


def licence(name: str) -> str:
    """Return what the package states; "" if it states nothing or is not installed and not known."""
    try:
        metadata = distribution(name).metadata
    except PackageNotFoundError:
        return next((text for pattern, text in ELSEWHERE.items() if fnmatch(name, pattern)), "")
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or [] if "License" in text]
    stated = metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License") or ""
    return stated.strip().partition("\n")[0]


def accepted(text: str) -> bool:
    """Return whether a package with this licence may be used."""
    return bool(ACCEPTED.search(text)) and not REFUSED.search(text)


def holds_copyleft(package: Distribution) -> bool:
    """Return whether a licence file of the package holds the text of a GNU licence."""
    files = [file for file in package.files or () if re.search(r"dist-info.*(licen|copying|notice)", str(file), re.I)]
    return any(COPYLEFT.search(Path(str(file.locate())).read_text(errors="replace")) for file in files)


def main() -> int:
    """Print a line for each package."""
    bad = False
    for name, version in sorted(locked().items()):
        text = licence(name)
        bad |= not accepted(text)
        note = f"; contains {BUNDLED[name]}" if name in BUNDLED else ""
        print(f"{'' if accepted(text) else 'NOT ACCEPTED: '}{name} {version}: {text or 'no licence stated'}{note}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
