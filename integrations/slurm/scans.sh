#!/usr/bin/env bash
# A folder of scans as a job array: each task takes its share of them, one after the other.
#
#   sbatch --array=0-9 integrations/slurm/scans.sh BUNDLE SCANS RESULTS [MORE ARGUMENTS OF medsr run]
#
#SBATCH --job-name=medsr
#SBATCH --cpus-per-task=4
#SBATCH --output=medsr-%A_%a.log
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: scans.sh BUNDLE SCANS RESULTS [MORE ARGUMENTS OF medsr run]" >&2
    exit 4
fi
bundle=$1 scans=$2 results=$3
shift 3
if [ ! -d "$scans" ]; then
    echo "$scans: there is no such folder" >&2
    exit 2
fi

# A process takes all cores of a node unless it is told.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
fi
tasks="${SLURM_ARRAY_TASK_COUNT:-1}"
mine=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
if [ "$mine" -ge "$tasks" ]; then
    echo "the array must be a range, such as 0-9, and no list: nobody would take the scans between" >&2
    exit 4
fi

number=0
failed=0
for scan in "$scans"/*; do
    name="$(basename "$scan")"
    lower="${name,,}"
    if [ ! -d "$scan" ] && [[ "$lower" != *.nii && "$lower" != *.nii.gz ]]; then
        continue
    fi
    share=$((number % tasks))
    number=$((number + 1))
    # A folder of its own for each scan: tasks must not share a report.json.
    out="$results/$name"
    if [ "$share" -ne "$mine" ]; then
        continue
    fi
    # What a task that was ended left behind is of no use to anyone. What is finished is skipped by medsr itself, or
    # refused, if settings, weights or the scan are others.
    replace=(--set overwrite=true)
    if [ -e "$out/finished" ]; then
        replace=()
    fi
    if medsr run "$bundle" "$scan" -o "$out" --quiet "$@" ${replace[@]+"${replace[@]}"}; then
        touch "$out/finished"
    else
        echo "$name: failed" >&2
        failed=$((failed + 1))
    fi
done

if [ "$number" -eq 0 ]; then
    echo "$scans: there are no NIfTI files and no folders in it" >&2
    exit 2
fi
if [ "$failed" -ne 0 ]; then
    echo "$failed scan(s) failed; the same command goes on with those that are not finished" >&2
    exit 1
fi
