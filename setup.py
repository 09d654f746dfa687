"""What pyproject.toml cannot say: a wheel ships native libraries (baton/engine/cpu/ship.py)."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))


class BuildWithLibraries(build_py):
    """Copies the packages, then makes the libraries beside them."""

    def run(self) -> None:
        from baton.engine.cpu.ship import ship

        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "baton" / "engine" / "cpu" / "shipped"
            ship(folder, Path(self.build_lib).parent / "native", print)


setup(cmdclass={"build_py": BuildWithLibraries})
