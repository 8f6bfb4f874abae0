"""pip's own settings on this machine, so that a build inside an image uses the same indexes, files and certificates.

No address is written in the repository: whatever pip is configured with here (or by the variables `PIP_*`) is used.
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: settings that say where packages come from; all else is left to pip
KEYS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "proxy", "timeout")


def pip_settings() -> dict[str, str]:
    """Where pip finds packages here: its configuration files, then the variables `PIP_*`, which win."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for source in ("global", "install", ":env:"):
        for name, value in re.findall(rf"^{re.escape(source)}\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
            if name in KEYS:
                found[name] = value.replace("\\n", " ")
    return found


def write_settings(settings: dict[str, str], path: Path) -> Path:
    """Write a pip configuration file that only its owner reads: an index's address may hold a password."""
    parser = configparser.RawConfigParser()
    parser["global"] = settings
    path.touch(mode=0o600)
    with path.open("w", encoding="utf-8") as file:
        parser.write(file)
    return path


def local_folders(settings: dict[str, str]) -> list[Path]:
    """Folders of this machine that pip reads: of files, or the parent of an index, whose links lead upwards."""
    found = []
    for key in ("find-links", "index-url", "extra-index-url"):
        for word in settings.get(key, "").split():
            url = urlsplit(word)
            if url.scheme not in ("", "file"):
                continue
            path = Path(unquote(url.path) if url.scheme else word).resolve()
            path = path if key == "find-links" and path.is_dir() else path.parent
            if path.is_dir() and path != Path("/"):
                found.append(path)
    return list(dict.fromkeys(found))
