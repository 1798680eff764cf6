"""What pyproject.toml cannot say: the kernel sources travel inside the package, to be compiled at first use."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernelSources(build_py):
    """Copy csrc/ to kvzip/csrc in what is built; an editable install finds it where it is."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            source, target = Path(__file__).parent / "csrc", Path(self.build_lib) / "kvzip" / "csrc"
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("tests"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithKernelSources})
