"""Makes `python -m tests.reliability` find this folder: a dependency installs a package of the same name."""
