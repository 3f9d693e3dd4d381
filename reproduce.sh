#!/usr/bin/env bash
# UserIP-Tuning from a bare machine to tables. Needs Python 3.10+, and network for the packages, the LLM and real data.
#
#   bash reproduce.sh                 the demo: planted users whose true profiles are known; with a GPU then `full`
#   bash reproduce.sh seeds           the demo's shop with two other data seeds, and the null shop without profiles
#   bash reproduce.sh ablations       the demo's shop with parts of the method left out, and with other codebook sizes
#   bash reproduce.sh small           real data: all tables for MovieLens-100K
#   bash reproduce.sh full            all tables for the data sets of SETS, by default the paper's three of Amazon
#   bash reproduce.sh test [ARG …]    the fast tests; further words go to pytest (-m slow: the slow ones)
#   bash reproduce.sh --help          this text
#
# A finished stage is skipped as long as its command, the modules it runs and the stages before it stay the same.
# Killed? Run the same command again. Logs: runs/NAME/STAGE.log; results: results/NAME/.
# Settings, as environment variables (defaults in brackets):
#   LM      causal LM: hub id or folder [the default LLM of `data.py lm`, into models/default]
#   USERS   users of the planted shop [240]      SEEDS  training seeds [5; 2 a fold for new users]
#   DTYPE   of the LLM [float32]                 DEVICE cpu or cuda [auto]
#   BUDGET  tokens in one pass of the LLM [1024 on a CPU, by its memory on a GPU], halved as often as memory runs out
#   NPROC   processes of the text table, by torchrun [1]    MODELS  click models of the demo [deepfm,dcn,fm,lr]
#   SETS    of full [amazon14:Video_Games amazon14:Clothing_Shoes_and_Jewelry amazon14:Movies_and_TV]; also
#           amazon18:X, amazon23:X, nete:PATH    RAW    folder with the data's files, if got by hand [download]
#   CODES   codes per profile on real data [16,16] CAP    users of each set, drawn by a hash [all]
#   REVIEWS rows of a user that also tell their review sentence, in `full`; each costs LLM time [none]
#   UIP_MIRROR  http://host/dir in place of all hosts of data [none]
#   RESULTS where results go [results; runs/results if USERS, SEEDS, MODELS, CODES, CAP, REVIEWS, DTYPE or LM are set,
#           so that the published ones stay]
#   VENV    where the packages live [.venv]      PYTHON to make it with [the first python3 ≥ 3.10]
# Relative paths are relative to this folder.
set -Eeuo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"

OWN=${USERS:-}${SEEDS:-}${MODELS:-}${CODES:-}${CAP:-}${REVIEWS:-}${LM:-}${DTYPE:-}
VENV=${VENV:-.venv} LM=${LM:-} USERS=${USERS:-240} MODELS=${MODELS:-deepfm,dcn,fm,lr} SEEDS=${SEEDS:-} RUN=
CODES=${CODES:-16,16} CAP=${CAP:-} REVIEWS=${REVIEWS:-} RAW=${RAW:-}
DTYPE=${DTYPE:-float32} DEVICE=${DEVICE:-auto} BUDGET=${BUDGET:-}
SETS=${SETS:-amazon14:Video_Games amazon14:Clothing_Shoes_and_Jewelry amazon14:Movies_and_TV}
if [ -z "${RESULTS:-}" ] && [ -n "$OWN" ]; then RESULTS=runs/results; else RESULTS=${RESULTS:-results}; fi
RESULTS=${RESULTS%/}
PY=$VENV/bin/python Q=$(printf %q "$VENV/bin/python")
EM="$Q uip.py"
[ "${NPROC:-1}" = 1 ] || EM="$Q -m torch.distributed.run --standalone --nproc-per-node=$NPROC uip.py"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that spin while they wait are slow on a shared machine
export PYTHONUNBUFFERED=1
[ -t 2 ] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-10}

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]##*/}" | sed -e '$d' -e 's/^# \{0,1\}//'; }
fail() { echo "reproduce.sh: $2" >&2; exit "$1"; }
hash_of() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -c1-32; }
at() { case $1 in env | lm) echo "runs/$1" ;; *) echo "runs/$RUN/$1" ;; esac; }   # shared by all runs, or the run's own
read_or_nothing() { cat "$1" 2>/dev/null || true; }

check() {  # check NAME REGEX WORDS: a setting that is empty has its default
  [ -z "${!1:-}" ] || [[ ${!1} =~ ^($2)$ ]] || fail 2 "$1=${!1} is not $3"
}
NUMBER='[1-9][0-9]{0,8}' MODEL='lr|fm|deepfm|dcn' SET='amazon(14|18|23):[A-Za-z0-9_]+|nete:[[:alnum:]_./~+,@%=-]+'
for name in USERS SEEDS BUDGET NPROC CAP REVIEWS; do check $name "$NUMBER" "a whole number from 1 to 999999999"; done
check CODES "$NUMBER,$NUMBER" "two numbers of codes, such as 16,16"
[ "${CODES%,*}" -le 65535 ] && [ "${CODES#*,}" -le 65535 ] || fail 2 "CODES=$CODES: a profile has at most 65535 codes"
check MODELS "($MODEL)(,($MODEL))*" "a list of lr, fm, deepfm and dcn, with commas between"
check SETS " *($SET)( +($SET))* *" \
  "a list of amazon14:X, amazon18:X, amazon23:X and nete:PATH (letters, digits and _./~+,@%=-), with spaces between"
check DTYPE "float32|bfloat16|float16" "one of float32, bfloat16 and float16"
check DEVICE "auto|cpu|cuda(:[0-9]+)?" "one of auto, cpu, cuda and cuda:NUMBER"
[ -z "$RAW" ] || [ -d "$RAW" ] || fail 4 "RAW=$RAW: there is no such folder"
case $RESULTS in *[!A-Za-z0-9_./-]*) fail 2 "RESULTS=$RESULTS is not a path of letters, digits and ._/-" ;; esac
case $LM in ./* | ../* | /*) [ -d "$LM" ] || fail 4 "LM=$LM: there is no such folder" ;; esac

# From here on `…`, not $(…), where this shell itself substitutes: bash 5.2 parses the latter, and a signal that comes
# meanwhile ends it by a syntax error in the trap (6 of 1,191 trials; of `…` 0 of 1,206).
CHILD= LOCK=
stopped() {  # by a signal
  trap '' INT TERM HUP
  echo >&2; echo "Interrupted. The same command resumes." >&2
  exit "$1"
}
leave() {  # however this script ends: the stage's processes end too
  trap '' INT TERM HUP
  if [ -n "$CHILD" ]; then kill -TERM -- "-$CHILD" 2>/dev/null || true; wait 2>/dev/null || true; fi
  [ -z "$LOCK" ] || rm -f "$LOCK"
}
trap 'stopped 130' INT; trap 'stopped 143' TERM; trap 'stopped 129' HUP; trap leave EXIT

lock() {  # lock FILE: a link that names the process at work. Made in one step; a dead process's is taken over
  local me host now owner=nobody pid try
  host=`uname -n` now=`date '+%Y-%m-%d %H:%M:%S'`
  me="process $$ on $host since $now"
  for try in 1 2 3; do
    if ln -s "$me" "$1" 2>/dev/null; then LOCK=$1; return; fi
    [ -L "$1" ] || fail 3 "cannot write in `dirname "$1"`"
    owner=`readlink "$1" || echo nobody` pid=${owner#process }
    case $owner in *" on $host since "*)
      [ -d "/proc/${pid%% *}" ] || kill -0 "${pid%% *}" 2>/dev/null || rm -f "$1" ;;
    esac
  done
  fail 2 "another run is at this stage, $owner. Wait for its end or stop it; if it is gone, remove $1"
}

# fingerprint COMMAND "MODULES" "STAGES": of all that a stage's output depends on
fingerprint() { { echo "$1"; cat /dev/null $2; for s in $3; do cat "$(at "$s").stamp"; done; } | hash_of; }

# stage NAME "MODULES it runs" "STAGES before it" OUTPUT COMMAND: runs COMMAND unless OUTPUT and the stamp of an equal
# run are there
stage() {
  local name=$1 modules=$2 before=$3 out=$4 command=$5 me stamp status began ended
  mkdir -p "runs/$RUN" 2>/dev/null || fail 3 "cannot write in $PWD: it needs a folder runs/ for its work"
  me=`at "$name"`
  stamp=`fingerprint "$command" "$modules" "$before"`
  if [ -e "$out" ] && [ "`read_or_nothing "$me.stamp"`" = "$stamp" ]; then echo "[$RUN/$name] up to date"; return; fi
  lock "$me.running"
  echo "[$RUN/$name] $command"
  rm -f "$me.stamp" "$me.exit"
  FRESH=--restart                          # what another command or other code left half done is dropped …
  [ "`read_or_nothing "$me.started"`" != "$stamp" ] || FRESH=     # … and what this one left is resumed
  echo "$stamp" > "$me.started"
  export FRESH
  began=`date +%s`
  set -m                                   # a process group of its own, and in the background: so signals reach both
  { bash -c "set -Eeuo pipefail; $command" 2>&1 && echo 0 > "$me.exit" || echo $? > "$me.exit"; } </dev/null |
    tee -i "$me.log" &
  CHILD=`jobs -p %+ || true`
  set +m
  wait || true
  CHILD= status=`read_or_nothing "$me.exit"`
  status=${status:-137}
  if [ "$status" -ne 0 ]; then
    printf '\nStage %s failed (exit %s). The last lines of %s:\n' "$name" "$status" "$me.log" >&2
    tr '\r' '\n' < "$me.log" | tail -n 5 | sed 's/^/    /' >&2
    echo "Mend the cause and run the same command again: finished stages are skipped, this one resumes." >&2
    exit "$status"
  fi
  ended=`date +%s`
  echo $((ended - began)) > "$me.seconds"
  echo "$stamp" > "$me.stamp.tmp" && mv "$me.stamp.tmp" "$me.stamp"
  rm -f "$LOCK"; LOCK=
}

python3_10() {  # the interpreter to make the environment with: PYTHON, or the first that is new enough
  local p
  for p in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python; do
    if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo "$p"; return; fi
    [ -z "${PYTHON:-}" ] || break
  done
  fail 3 "${PYTHON:-python3} is not Python 3.10 or newer: install one, or set PYTHON=/path/to/python3"
}

environment() {  # .venv with the pinned packages; one that this script left half made is made again, no other
  local python
  mkdir -p runs 2>/dev/null || fail 3 "cannot write in $PWD: it needs a folder runs/ for its work"
  export NEW_ENV=:                              # not part of the stage's command: that is the same the next time
  if ! "$PY" -c 'import os, pip, sys; sys.exit(os.path.realpath(sys.prefix) != os.path.realpath(sys.argv[1]))' \
      "$VENV" 2>/dev/null; then
    if [ -e "$VENV" ] && [ "`read_or_nothing runs/env.venv`" != "$VENV" ]; then
      fail 2 "$VENV exists and is not a Python environment with pip: move it, or set VENV"
    fi
    python=`python3_10`
    echo "$VENV" > runs/env.venv && rm -f runs/env.stamp
    NEW_ENV="`printf %q "$python"` -m venv --clear `printf %q "$VENV"`"
  fi
  stage env requirements.txt "" "$PY" \
    "eval \"\$NEW_ENV\" && $Q -m pip install --quiet --disable-pip-version-check -r requirements.txt"
}

DEVICE_SEEN=
ready() {  # the environment, and what a run needs beside it
  mkdir -p "$RESULTS" 2>/dev/null && [ -w "$RESULTS" ] || fail 3 "RESULTS=$RESULTS: cannot write there"
  environment
  case $DEVICE in cuda*)
    [ -n "$DEVICE_SEEN" ] || "$PY" -c 'import sys, torch; torch.zeros(1, device=sys.argv[1])' "$DEVICE" 2>/dev/null ||
      fail 2 "DEVICE=$DEVICE: torch cannot use it" ;;
  esac
  DEVICE_SEEN=1
}

language_model() {  # the default one, or LM; its fingerprint is part of a stage's command, so a changed folder is seen
  local name identity='import data, sys, uip
data.run_command("uip.py", lambda: print(uip.lm_identity(sys.argv[1])["fingerprint"]))'
  name=`printf %q "${LM:-models/default}"`
  [ -n "$LM" ] || stage lm data.py env models/default/model.safetensors "$Q data.py lm --out models/default"
  identity=`"$PY" -c "$identity" "${LM:-models/default}"` || exit
  [ -z "$LM" ] || stage lm "" env . "echo LM=$name"
  ARGS="--lm $name --dtype $DTYPE --device $DEVICE${BUDGET:+ --budget $BUDGET} \$FRESH  # LLM $identity"
}

seconds() {  # seconds per stage of the run so far, as JSON
  local s sep=
  printf '{'
  for s in env lm data profiles bank ctr; do
    [ ! -f "$(at "$s").seconds" ] || { printf '%s"%s": %s' "$sep" "$s" "$(cat "$(at "$s").seconds")"; sep=', '; }
  done
  printf '}\n'
}
export -f at seconds read_or_nothing

# shop NAME "FLAGS of data.py planted" "FLAGS of uip.py fit" FEATURES: every stage, from the environment to the records
shop() {
  local d=runs/$1 r=$RESULTS/$1
  export RUN=$1
  ready
  language_model
  stage data data.py env "$d/data/meta.json" "$Q data.py planted --out $d/data --users $USERS $2"
  profiles_and_bank "$d" "$r" "$3"
  stage ctr "ctr.py codebook.py" "data profiles" "$r/runs.jsonl" \
    "$Q ctr.py run --data $d/data --profiles $d/profiles --models ${5:-deepfm} --features $4 --seeds ${SEEDS:-5} \
     --lr 0.02 --l2 0.001 --device $DEVICE --out $r \$FRESH"
  stage table "ctr.py results/report.py" "bank ctr" "$r/summary.json" \
    "seconds > $d/seconds.json && $Q results/report.py summary --results $r --profiles $d/profiles \
     --seconds $d/seconds.json && $PAGES"
}

profiles_and_bank() {  # profiles_and_bank RUN_FOLDER RESULTS_FOLDER "FLAGS of uip.py fit"
  local from="--profiles $1/profiles --data $1/data"
  stage profiles "uip.py codebook.py" "lm data" "$1/profiles/profiles.npz" \
    "$EM fit --data $1/data --out $1/profiles $3 $ARGS"
  stage bank "codebook.py results/report.py" "data profiles" "$2/score.json" \
    "$Q codebook.py bank --profiles $1/profiles --out $1/bank && mkdir -p $2 && \
     $Q results/report.py score $from --out $2 && $Q codebook.py cards $from --out $2/cards.md"
}
PAGES="$Q results/report.py --results $RESULTS"    # makes all pages from the records; the top README from results/ only
[ "$RESULTS" = results ] || PAGES="$PAGES --readme $RESULTS/none"
ALL=none,random,shuffled,stats,gap,untuned,bag,userip,stats+userip

clicks() {  # clicks STAGE OUT "FLAGS of ctr.py run" [PROFILES [STAGE before]]: click models of the data set RUN
  local restart='$FRESH'
  [ $# -lt 5 ] || restart=                     # behind another stage, whose runs stay in the same folder
  stage "$1" "ctr.py codebook.py" "${4:-profiles} ${5:-}" "$2/runs.jsonl" \
    "$Q ctr.py run --data runs/$RUN/data --profiles runs/$RUN/${4:-profiles} $3 $CLICK --device $DEVICE \
     --out $2 $restart"
}

# real NAME "ARGUMENTS of data.py": one text table; new and warm users, with the labels liked and chosen; new users with
# parts of the method left out, with other codebook sizes, and with titles alone; then the other backbones
real() {
  local d=runs/$1 r=$RESULTS/$1 protocol label seeds part k one no_reviews=title,category,brand,price,verdict
  local features=none,random,shuffled,items,stats,gap,untuned,reversed,bag,userip
  features+=,stats+gap,stats+gap+items,stats+gap+untuned,stats+gap+bag,stats+gap+userip
  case $2 in nete:*) no_reviews=category,brand,feature,price,person,verdict ;; esac
  export RUN=$1
  ready
  language_model
  stage data data.py env "$d/data/meta.json" "$Q data.py $2 --out $d/data"
  profiles_and_bank "$d" "$r" "--codes $CODES --reversed"
  [ ! -f "$d/data/truth.npz" ] || stage meaning results/report.py bank "$r/meaning.json" \
    "$Q results/report.py meaning --profiles $d/profiles --data $d/data --out $r"
  for label in liked chosen; do
    for protocol in new warm; do
      case $protocol in new) seeds=2 ;; *) seeds=5 ;; esac      # intervals of new are over folds, of warm over seeds
      clicks "$protocol-$label" "$r-$protocol-$label" \
        "--protocol $protocol --label $label --features $features --seeds ${SEEDS:-$seeds}"
      "$PY" ctr.py table "$r-$protocol-$label"
    done
  done
  for label in liked chosen; do
    one="--protocol new --label $label --features userip --seeds ${SEEDS:-2}"
    for part in em kmeans signal; do
      clicks "$label-without-$part" "$r-new-$label-without-$part" "$one --without $part"
    done
    for k in 2 4 8 32; do clicks "$label-codes-$k" "$r-new-$label-codes-$k" "$one --codes $k,$k"; done
    case $2 in nete:*) ;; *) clicks "$label-titles" "$r-titles-new-$label" "--protocol new --label $label \
      --kinds title --features none,random,untuned,reversed,bag,userip --seeds ${SEEDS:-2}" ;; esac
    [ -z "$REVIEWS" ] || clicks "$label-without-review" "$r-new-$label-without-review" "$one --kinds $no_reviews"
  done
  one="--protocol new --features userip --seeds ${SEEDS:-2}"
  clicks without-ties "$r-new-liked-without-ties" "$one --without ties"
  clicks without-unsure "$r-new-liked-without-unsure" "$one --sure 0.5"
  clicks without-time "$r-warm-liked-without-time" \
    "--protocol warm --features userip --seeds ${SEEDS:-5} --without time"
  for part in views mask pretraining; do
    stage "profiles-$part" "uip.py codebook.py" "lm data" "$d/profiles-$part/profiles.npz" \
      "$EM fit --data $d/data --out $d/profiles-$part --codes $CODES --without $part $ARGS"
    clicks "without-$part" "$r-new-liked-without-$part" "$one" "profiles-$part"
  done
  for protocol in new warm; do
    case $protocol in new) seeds=2 ;; *) seeds=5 ;; esac
    clicks "backbones-$protocol" "$r-$protocol-liked" "--protocol $protocol --features $features --models lr,fm,dcn \
      --seeds ${SEEDS:-$seeds}" profiles "$protocol-liked"
  done
  stage tables "ctr.py results/report.py" "backbones-new backbones-warm" "$RESULTS/README.md" "$PAGES"
}
# Chosen for each model by the validation AUC without IDs: results/log.md.
CLICK="--lr 0.001,lr=0.01,fm=0.03 --l2 0.001,lr=0.00001,fm=0.0001 --batch 1024"

run_name() { echo "$1" | tr ':/' '--'; }

every_set() {
  local set raw flags="${CAP:+ --users $CAP}${REVIEWS:+ --reviews $REVIEWS}"
  for set in $SETS; do
    case $set in nete:*)
      [ -f "${set#nete:}/reviews.pickle" ] || [ -f "runs/`run_name "$set"`/data/meta.json" ] ||
        fail 4 "$set: there is no reviews.pickle" ;;
    esac
  done
  for set in $SETS; do
    raw="${RAW:+ --raw `printf %q "$RAW"`}"
    case $set in nete:*) raw= ;; esac                          # it names its folder itself
    real "`run_name "$set"`" "$set$flags$raw"
  done
}

[ $# -le 1 ] || [ "$1" = test ] || fail 2 "one word at a time, not: $*"
[ "$RESULTS" = results ] || echo "With settings of your own, results go to $RESULTS; those in results/ stay."
case ${1:-demo} in
  -h | --help | help) usage ;;
  demo)
    shop demo "--seed 0" "--codes 4,3" $ALL $MODELS
    "$PY" ctr.py table "$RESULTS/demo"
    if [ "$DEVICE" != cpu ] && "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
      "$PY" results/report.py forecast --profiles runs/demo/profiles
      echo "A CUDA device is here: next comes \`full\` ($SETS). Ctrl-C stops it, and the same command resumes."
      every_set
    else
      echo "Real data: bash reproduce.sh small (MovieLens-100K), bash reproduce.sh full (Amazon)."
      "$PY" results/report.py forecast --profiles runs/demo/profiles
    fi ;;
  small)
    [ -z "$REVIEWS$CAP" ] || fail 2 "MovieLens-100K has no reviews, and all its users: unset REVIEWS and CAP"
    real ml-100k "ml-100k${RAW:+ --raw `printf %q "$RAW"`}" ;;
  full) every_set ;;
  seeds)
    shop demo "--seed 0" "--codes 4,3" $ALL $MODELS
    for seed in 1 2; do shop demo-$seed "--seed $seed" "--codes 4,3" $ALL; done
    shop null "--seed 0 --null" "--codes 4,3" $ALL ;;
  ablations)
    shop demo "--seed 0" "--codes 4,3" $ALL $MODELS
    for part in em kmeans signal tuning causality llm views mask pretraining; do
      case $part in views | mask | pretraining) table= ;; *) table="--table runs/demo/profiles/table" ;; esac
      shop "demo-without-$part" "--seed 0" "--codes 4,3 --without $part $table" none,userip
    done
    table="--table runs/demo/profiles/table"
    for k in 2 8 16 32; do shop "demo-codes-$k" "--seed 0" "--codes $k,$k $table" none,userip; done ;;
  test)
    shift; export RUN=test; environment
    "$PY" -m pytest -q -p no:cacheprovider -o "markers=slow: minutes, run by .ci/run" -m "not slow" "$@" test_uip.py ;;
  *) echo "reproduce.sh: unknown word '$1'" >&2; usage >&2; exit 2 ;;
esac
