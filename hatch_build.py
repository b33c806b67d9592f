"""Build hook of hatchling: copies the programs and recipes into a wheel.

They stay at the top of the repository, where they are read and run. A wheel has them inside the
package, so that site-packages gets no top-level `train`, `infer`, `convert` or `configs`.
internvl3_jax/cli finds either place. An editable install needs no copies.
"""

import pathlib

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAMS = ("train.py", "infer.py", "convert")
# Recipes of examples/, which needs a clone.
CLONE_ONLY = {"miniature.py", "preference.py", "process_reward.py", "tiny_digits.py"}


class ProgramsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            return
        root = pathlib.Path(self.root)
        recipes = {path.name for path in (root / "configs").glob("*.py")} - CLONE_ONLY
        names = [*PROGRAMS, *(f"configs/{name}" for name in sorted(recipes))]
        build_data["force_include"] |= {
            str(root / name): f"internvl3_jax/cli/{name}" for name in names
        }
