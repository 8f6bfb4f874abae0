"""What the suite knows of model architectures."""

from typing import Any

#: how the library reads a folder: from the disk alone, and never running code that lies in it
OWN_FILES: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
