"""Running the scripts as their user does, and looking at what they leave behind."""
import json
import os
import signal
import subprocess
import sys

import trainer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(script, *flags):
    return [sys.executable, os.path.join(ROOT, script), *map(str, flags)]


def run(script, *flags):
    """Runs a script to its end, -> CompletedProcess with stdout and stderr as text."""
    return subprocess.run(command(script, *flags), capture_output=True, text=True)


def run_well(script, *flags):
    """Runs a script that has to succeed, -> what it printed."""
    done = run(script, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stop_at(text, script, *flags):
    """Runs a script and sends it SIGTERM when it prints `text`; it has to end as such a process does."""
    process = subprocess.Popen(command(script, *flags), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if text in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def assert_one_line(done, *reasons):
    """A user's mistake: exit code 2 and one line on stderr that holds the reasons."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and 'Traceback' not in done.stderr, done.stderr
    for reason in reasons:
        assert reason in done.stderr


def history(folder):
    return [json.loads(line) for line in (folder / 'history.jsonl').read_text().splitlines()]


def without_seconds(folder):
    return [{key: value for key, value in line.items() if key != 'seconds'} for line in history(folder)]


def checkpoint_names(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith('checkpoint-'))


def checkpoint(folder):
    """What the last checkpoint of a folder holds, with what time alone decides taken out."""
    name = checkpoint_names(folder)[-1]
    about, state = trainer.read_checkpoint(os.path.join(folder, name))
    about['meter'].pop('seconds')
    return name, about, {key: array.tobytes() for key, array in state.items()}
