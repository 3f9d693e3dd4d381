#!/usr/bin/env bash
# UserIP-Tuning from a bare machine to a table. Needs Python 3.10+, and network for the packages and the LLM.
#
#   bash reproduce.sh                 the demo: planted users whose true profiles are known (minutes on two CPU cores)
#   bash reproduce.sh profiles        the demo up to one stage: env lm data profiles bank ctr table
#   bash reproduce.sh seeds           the demo's shop with two other data seeds, and the null shop without profiles
#   bash reproduce.sh ablations       the demo's shop with parts of the method left out, and with other codebook sizes
#   bash reproduce.sh test [ARG …]    the tests; further words go to pytest (-m slow: the slow ones)
#   bash reproduce.sh small           real data: MovieLens-100K, new and warm users; an hour or so on two CPU cores
#   bash reproduce.sh full            the same for the sets of SETS, by default the paper's of Amazon; meant for a GPU
#   bash reproduce.sh --help          this text
#
# A finished stage is skipped as long as its command, the modules it runs and the stages before it stay the same.
# Killed? Run the same command again. Logs: runs/NAME/STAGE.log; results: results/NAME/.
# Settings, as environment variables (defaults in brackets):
#   LM      causal LM: hub id or folder [the default LLM of `data.py lm`, into models/default]
#   USERS   users of the planted shop [240]      CODES  codebook size of each profile [4,3]
#   MODELS  click models [deepfm,dcn,fm,lr]      SEEDS  training seeds [5]
#   DTYPE   of the LLM [auto]                    DEVICE cpu or cuda [auto]
#   KNOWN   rows known of a new user [1 2 4 8]   NPROC  processes of the EM, by torchrun [1]
#   BUDGET  tokens in one pass of the LLM [1024; for a GPU try 16384], halved as often as memory runs out
#   SETS    of full [amazon14:Movies_and_TV amazon14:Clothing_Shoes_and_Jewelry amazon14:Video_Games]; also amazon18:X,
#           amazon23:X, nete:PATH              CAP    users of each, drawn by a hash [all]
#   VENV    where the packages live [.venv]      PYTHON to make it with [the first python3 ≥ 3.10]
# Relative paths are relative to this folder.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=${VENV:-.venv} LM=${LM:-} USERS=${USERS:-240} CODES=${CODES:-4,3} SEEDS=${SEEDS:-5} UNTIL= RUN=
GIVEN=${MODELS:-} MODELS=${MODELS:-deepfm,dcn,fm,lr} DTYPE=${DTYPE:-auto} DEVICE=${DEVICE:-auto}
FEATURES=none,random,shuffled,stats,userip,stats+userip WITHOUT=
CLICK="--lr 0.02 --l2 0.001"                 # the best of a grid by DeepFM's validation AUC *without* IDs, data seed 7
PY=$VENV/bin/python Q=$(printf %q "$VENV/bin/python") KNOWN=${KNOWN:-1 2 4 8}
SETS=${SETS:-amazon14:Movies_and_TV amazon14:Clothing_Shoes_and_Jewelry amazon14:Video_Games} CAP=${CAP:-}
EM="$Q uip.py"
[ "${NPROC:-1}" = 1 ] || EM="$Q -m torch.distributed.run --standalone --nproc-per-node=$NPROC uip.py"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}   # threads that spin while they wait are slow on a shared machine
export PYTHONUNBUFFERED=1
[ ! -t 1 ] || export UIP_PROGRESS=bar        # our pipe into the log hides the terminal from the progress bars

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]##*/}" | sed -e '$d' -e 's/^# \{0,1\}//'; }
hash_of() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -c1-32; }
at() { case $1 in env | lm) echo "runs/$1" ;; *) echo "runs/$RUN/$1" ;; esac; }   # shared by all runs, or the run's own

# From here on `…`, not $(…), where this shell itself substitutes: bash 5.2 parses the latter, and a signal that comes
# meanwhile ends it by a syntax error in the trap (6 of 1,191 trials; of `…` 0 of 1,206).
CHILD= LOCK=
stopped() {  # by a signal
  trap '' INT TERM HUP
  echo >&2; echo "Interrupted. The same command goes on from here." >&2
  exit "$1"
}
leave() {  # however this script ends: the stage's processes end too
  trap '' INT TERM HUP
  if [ -n "$CHILD" ]; then kill -TERM -- "-$CHILD" 2>/dev/null || true; wait 2>/dev/null || true; fi
  [ -z "$LOCK" ] || rm -f "$LOCK"
}
trap 'stopped 130' INT; trap 'stopped 143' TERM; trap 'stopped 129' HUP; trap leave EXIT

hold() {  # hold FILE: a link that says who runs the stage. Made in one step; one of a dead process is taken over
  local me host now owner=nobody pid try
  host=`uname -n` now=`date '+%Y-%m-%d %H:%M:%S'`
  me="process $$ on $host since $now"
  for try in 1 2 3; do
    if ln -s "$me" "$1" 2>/dev/null; then LOCK=$1; return; fi
    owner=`readlink "$1" || echo nobody` pid=${owner#process }
    case $owner in *" on $host since "*)
      [ -d "/proc/${pid%% *}" ] || kill -0 "${pid%% *}" 2>/dev/null || rm -f "$1" ;;
    esac
  done
  echo "reproduce.sh: another run is at this stage, $owner. Wait for its end or stop it; if it is gone, remove $1" >&2
  exit 2
}

# fingerprint COMMAND "MODULES" "STAGES": of all that a stage's output depends on
fingerprint() { { echo "$1"; cat /dev/null $2; for s in $3; do cat "$(at "$s").stamp"; done; } | hash_of; }
told() { cat "$1" 2>/dev/null || true; }

# stage NAME "MODULES it runs" "STAGES before it" OUTPUT COMMAND: runs COMMAND unless OUTPUT and the stamp of an equal
# run are there
stage() {
  local name=$1 modules=$2 before=$3 out=$4 command=$5 me stamp status began ended
  mkdir -p "runs/$RUN"
  me=`at "$name"`
  stamp=`fingerprint "$command" "$modules" "$before"`
  if [ -e "$out" ] && [ "`told "$me.stamp"`" = "$stamp" ]; then
    echo "[$RUN/$name] up to date"
  else
    hold "$me.running"                       # (bank.lock is codebook.py's own)
    echo "[$RUN/$name] $command"
    rm -f "$me.stamp" "$me.exit"
    FRESH=--restart                          # what another command or other code left half done is dropped …
    [ "`told "$me.started"`" != "$stamp" ] || FRESH=      # … and what this one left is resumed
    echo "$stamp" > "$me.started"
    export FRESH
    began=`date +%s`
    set -m                                   # a process group of its own, and in the background: so signals reach both
    { bash -c "set -Eeuo pipefail; $command" 2>&1 && echo 0 > "$me.exit" || echo $? > "$me.exit"; } </dev/null | tee -i "$me.log" &
    CHILD=`jobs -p %+ || true`
    set +m
    wait || true
    CHILD= status=`told "$me.exit"`
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
  fi
  [ "$name" != "$UNTIL" ] || { echo "Done, up to stage $UNTIL."; exit 0; }
}

python3_10() {  # the interpreter to make the environment with: PYTHON, or the first that is new enough
  local p
  for p in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python; do
    if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo "$p"; return; fi
    [ -z "${PYTHON:-}" ] || break
  done
  echo "reproduce.sh: ${PYTHON:-python3} is no Python 3.10 or newer: install one, or set PYTHON=/path/to/python3" >&2
  exit 3
}

environment() {  # .venv with the pinned packages; one that this script left half made is made again, no other
  local python
  export NEW_ENV=:                              # not part of the stage's command: that is the same the next time
  if ! "$PY" -c 'import os, pip, sys; sys.exit(os.path.realpath(sys.prefix) != os.path.realpath(sys.argv[1]))' \
      "$VENV" 2>/dev/null; then
    if [ -e "$VENV" ] && [ "$(cat runs/env.venv 2>/dev/null)" != "$VENV" ]; then
      echo "reproduce.sh: $VENV is there and is no Python environment with pip: move it, or set VENV" >&2
      exit 2
    fi
    python=`python3_10`
    mkdir -p runs && echo "$VENV" > runs/env.venv && rm -f runs/env.stamp
    NEW_ENV="$(printf %q "$python") -m venv --clear $(printf %q "$VENV")"
  fi
  stage env requirements.txt "" "$PY" "eval \"\$NEW_ENV\" && $Q -m pip install --quiet --disable-pip-version-check -r requirements.txt"
}

seconds() {  # seconds per stage of the run so far, as JSON
  local s sep=
  printf '{'
  for s in env lm data profiles bank ctr; do
    [ ! -f "$(at "$s").seconds" ] || { printf '%s"%s": %s' "$sep" "$s" "$(cat "$(at "$s").seconds")"; sep=', '; }
  done
  printf '}\n'
}
export -f at seconds

language_model() {  # the default one, or which one LM is
  if [ -z "$LM" ]; then
    stage lm data.py env models/default/source.json "$Q data.py lm --out models/default"
  else
    stage lm "" env . "echo LM=$(printf %q "$LM") $(head -c 4000000 "$LM"/*.safetensors 2>/dev/null | hash_of)"
  fi
}

# shop NAME "FLAGS of data.py planted": every stage, from the environment to the table
shop() {
  local flags=$2 d=runs/$1 r=results/$1 lm=${LM:-models/default}
  export RUN=$1
  environment
  language_model
  lm=`printf %q "$lm"`
  stage data data.py env "$d/data/meta.json" "$Q data.py planted --out $d/data --users $USERS $flags"
  stage profiles "uip.py codebook.py" "lm data" "$d/profiles/profiles.npz" \
    "$EM fit --data $d/data --lm $lm --out $d/profiles --codes $CODES --steps 3 --dtype $DTYPE --device $DEVICE$WITHOUT \$FRESH"
  stage bank codebook.py "data profiles" "$r/score.json" \
    "$Q codebook.py bank --profiles $d/profiles --out $d/bank && mkdir -p $r && $Q codebook.py score --profiles $d/profiles --data $d/data --out $r/score.json && $Q codebook.py cards --profiles $d/profiles --data $d/data --out $r/cards.md"
  stage ctr ctr.py "data bank" "$r/${MODELS%%,*}_none_0.json" \
    "$Q ctr.py run --data $d/data --bank $d/bank --models $MODELS --features $FEATURES --seeds $SEEDS $CLICK --device $DEVICE --out $r \$FRESH"
  stage table ctr.py "bank ctr" "$r/summary.json" \
    "seconds > $r/seconds.json && $Q ctr.py table $r --out $r/table.md --summary $r/summary.json"
}

# real NAME "ARGUMENTS of data.py": first some users are new: EM on the others' first 8 rows, then everyone's IDs from their
# first 1 to 8, also without tuning and without an LLM. Then all users are warm; and what their IDs tell of gender, age and
# occupation, where those are known
real() {
  local d=runs/$1 r=results/$1 few=${GIVEN:-deepfm} n part w before=warmctr
  local em="--lm $(printf %q "${LM:-models/default}") --dtype $DTYPE --device $DEVICE${BUDGET:+ --budget $BUDGET} \$FRESH"
  local fit="--codes 4,8 --rounds 0 --steps 1 --shrink 20"       # chosen without the test users: results/ml-100k/log.md
  local all=$FEATURES,hobby,background,stats+background,gap,stats+gap
  local click="--seeds $SEEDS --lr 0.002 --l2 0.0003 --dim 4 --batch 1024 --device $DEVICE"
  export RUN=$1
  environment
  language_model
  stage data data.py env "$d/data/meta.json" "$Q data.py $2 --out $d/data"
  stage profiles "uip.py codebook.py" "lm data" "$d/profiles/profiles.npz" "$EM fit --data $d/data/new --out $d/profiles $fit $em"
  for n in $KNOWN; do
    stage "infer$n" "uip.py codebook.py" profiles "$d/profiles$n/profiles.npz" \
      "$EM infer --data $d/data/new/n$n --profiles $d/profiles --out $d/profiles$n $em"
    stage "bank$n" codebook.py "infer$n" "$d/bank$n/meta.json" "$Q codebook.py bank --profiles $d/profiles$n --out $d/bank$n"
    stage "ctr$n" ctr.py "bank$n" "$r/new$n/${few%%,*}_none_0.json" \
      "$Q ctr.py run --data $d/data/new/n$n --bank $d/bank$n --drop user --models $few --features $all $click --out $r/new$n \$FRESH"
  done
  for part in tuning llm; do
    w=$d/without-$part
    stage "without-$part" "uip.py codebook.py" "lm data" "$w/profiles/profiles.npz" \
      "$EM fit --data $d/data/new --out $w/profiles $fit --without $part $em"
    for n in $(printf '%s\n' "${KNOWN%% *}" "${KNOWN##* }" | uniq); do
      before="$before without-$part-$n"
      stage "without-$part-$n" "uip.py codebook.py ctr.py" "without-$part" "$r/without-$part-new$n/${few%%,*}_none_0.json" \
        "$EM infer --data $d/data/new/n$n --profiles $w/profiles --out $w/profiles$n $em && $Q codebook.py bank --profiles $w/profiles$n --out $w/bank$n && $Q ctr.py run --data $d/data/new/n$n --bank $w/bank$n --drop user --models $few --features none,stats,userip,background,stats+userip $click --out $r/without-$part-new$n \$FRESH"
    done
  done
  stage warm "uip.py codebook.py" "lm data" "$d/warm/profiles.npz" "$EM fit --data $d/data --out $d/warm $fit $em"
  stage warmbank codebook.py warm "$r/cards.md" \
    "$Q codebook.py bank --profiles $d/warm --out $d/warmbank && mkdir -p $r && $Q codebook.py cards --profiles $d/warm --data $d/data --out $r/cards.md"
  [ ! -f "$d/data/truth.npz" ] || stage meaning codebook.py warm "$r/meaning.json" \
    "$Q codebook.py meaning --profiles $d/warm --data $d/data --out $r/meaning.json"
  stage warmctr ctr.py warmbank "$r/warm/${MODELS%%,*}_none_0.json" \
    "$Q ctr.py run --data $d/data --bank $d/warmbank --models $MODELS --features $FEATURES $click --out $r/warm \$FRESH"
  stage table ctr.py "$(printf 'ctr%s ' $KNOWN) $before" "$r/table.md" "$Q ctr.py tables results"
  cat "$r/known.md" "$r/warm.md"
}

case ${1:-demo} in
  -h | --help | help) usage ;;
  demo)
    shop demo "--seed 0"; cat results/demo/table.md
    echo "Real data: bash reproduce.sh small (MovieLens-100K), bash reproduce.sh full (Amazon)." ;;
  small) real ml-100k ml-100k ;;
  full) for set in $SETS; do real "${set//[:\/]/-}" "$set --new${CAP:+ --users $CAP}"; done ;;
  env | lm | data | profiles | bank | ctr | table) UNTIL=$1; shop demo "--seed 0" ;;
  seeds)
    shop demo "--seed 0"
    FEATURES=none,random,shuffled,stats,userip MODELS=${GIVEN:-deepfm}
    shop demo-1 "--seed 1"; shop demo-2 "--seed 2"; shop null "--seed 0 --null"
    "$PY" ctr.py tables results
    cat results/shops.md ;;
  ablations)
    shop demo "--seed 0"
    FEATURES=none,random,shuffled,stats,userip MODELS=${GIVEN:-deepfm}
    for part in em views mask kmeans pretraining tuning llm; do WITHOUT=" --without $part"; shop "without-$part" "--seed 0"; done
    for k in 2 8 16 32; do WITHOUT= CODES=$k,$k; shop "codes-$k" "--seed 0"; done
    "$PY" ctr.py tables results
    cat results/ablations.md results/sizes.md ;;
  test)
    shift; export RUN=test; environment
    "$PY" -m pytest -q -p no:cacheprovider -o "markers=slow: minutes, run by .ci/run" -m "not slow" "$@" test_uip.py ;;
  *) echo "reproduce.sh: unknown word '$1'" >&2; usage >&2; exit 2 ;;
esac
