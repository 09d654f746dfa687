# Stages of a session on a lent GPU; sourced by gpu_first.sh and gpu_second.sh.
#
# Each stage has a limit of its own (`timeout`, and SIGKILL 5 s later), its output is a file, and how it
# ended is a line of summary.txt. No stage begins, or goes on, beyond the session's limit.
#
#   OUT=DIR                 where everything goes, the first argument
#   PYTHON=python           the interpreter
#   BATON_GPU_STAND_IN=1    a rehearsal where there is no card: small sizes, on the CPU
#   BATON_STAGE_S=STAGE:S   limit of this stage, for tests of these scripts; BATON_KILL_S=S likewise

out=$1
if [ -z "$out" ]; then
  echo "usage: $0 DIR" >&2
  exit 2
fi
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$(readlink -f "$0")")/../.." || exit 1
python=${PYTHON:-python}
kill_s=${BATON_KILL_S:-5}
mkdir -p "$out/logs"
export BATON_KEEP_LOGS="$out/logs" PYTHONUNBUFFERED=1
device=cuda:0
quick=
if [ -n "$BATON_GPU_STAND_IN" ]; then
  device=cpu
  quick=--quick
fi
began=$(date +%s)

# session SECONDS NAME: the limit of all stages together.
session() {
  session_s=$1
  name=$2
  : >"$out/$name.summary.txt"
  echo "$name: $(date -u +%Y-%m-%dT%H:%M:%SZ), at most $session_s s, on $device" | tee -a "$out/$name.summary.txt"
}

# stage SECONDS NAME COMMAND...: run it in at most so many seconds.
stage() {
  limit=$1
  stage_name=$2
  case $BATON_STAGE_S in "$stage_name":*) limit=${BATON_STAGE_S#*:} ;; esac
  shift 2
  left=$((began + session_s - kill_s - 1 - $(date +%s)))
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 1 ]; then
    say "$stage_name" "not run: no time was left" 0
    return
  fi
  from=$(date +%s)
  timeout -k "$kill_s" "$limit" "$@" >"$out/$stage_name.txt" 2>&1
  code=$?
  case $code in
    0) how=ok ;;
    124 | 137) how="timed out after $limit s" ;;
    *) how="failed with $code" ;;
  esac
  say "$stage_name" "$how" $(($(date +%s) - from))
}

# say STAGE HOW SECONDS: one line of the summary, with the last line that the stage wrote.
say() {
  last=
  [ -s "$out/$1.txt" ] && last=$(tail -n 1 "$out/$1.txt" | cut -c 1-300)
  printf '%-12s %-24s %4s s  %s\n' "$1" "$2" "$3" "$last" | tee -a "$out/$name.summary.txt"
}

# The rest of each line below is given to the program.

# probe SECONDS STAGE WHAT...: a stage of gpu_probe.py.
probe() {
  s=$1 n=$2
  shift 2
  stage "$s" "$n" "$python" -m tools.benchmarks.gpu_probe --device "$device" $quick "$@"
}

# tests SECONDS STAGE TESTS...: a stage of tests; junit beside its output.
tests() {
  s=$1 n=$2
  shift 2
  stage "$s" "$n" "$python" -m pytest -q -W default --timeout 60 -p no:cacheprovider \
    --junitxml "$out/$n.xml" "$@"
}

# figures SECONDS STAGE SECTIONS...: a stage of gpu.py, whose own limit is a little shorter.
figures() {
  s=$1 n=$2
  shift 2
  stage "$s" "$n" "$python" -m tools.benchmarks.gpu --device "$device" $quick --budget $((s - 8)) \
    --output "$out/$n" "$@"
}

# ended STAGE: whether it ended well in this session or an earlier one in the same folder.
ended() {
  grep -hq "^$1 *ok " "$out"/*.summary.txt 2>/dev/null
}

finish() {
  echo "$name: $(($(date +%s) - began)) s of $session_s, all output in $out" | tee -a "$out/$name.summary.txt"
}
