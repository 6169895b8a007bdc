"""Runs the scripts, in this process or in processes of their own, and reads what they have written."""
import contextlib
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import utils
from engine import console, custom_ops
from engine.checkpoint import read_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(script, *flags):
    return [sys.executable, os.path.join(ROOT, script), *map(str, flags)]


def run_in_process(script, *flags):
    """Runs a script's main() in this process, -> CompletedProcess as of `run`; logging and operators are reset after."""
    name = os.path.splitext(os.path.basename(script))[0]
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [script, *map(str, flags)]
    enabled, code = custom_ops.enabled(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            utils.run(importlib.import_module(name).main)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        custom_ops.enable(enabled)
        for handler in console.log.handlers:
            handler.close()
        console.log.handlers = []
        console.log.propagate = True
    return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())


def run(script, *flags):
    """Runs a script to its end, -> CompletedProcess with stdout and stderr as text."""
    return subprocess.run(command(script, *flags), capture_output=True, text=True)


def run_well(script, *flags):
    """Runs a script that has to succeed, -> what it printed."""
    done = run(script, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_two(script, *flags):
    """Starts a script in two processes that find each other as launch would let them, -> [Popen] by rank."""
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(('127.0.0.1', 0))
    ends = ['{}:{}'.format(*each.getsockname()) for each in sockets]
    for each in sockets:
        each.close()
    environments = [dict(os.environ, PADDLE_TRAINERS_NUM='2', PADDLE_TRAINER_ID=str(rank),
                         PADDLE_RANK_IN_NODE=str(rank), PADDLE_CURRENT_ENDPOINT=ends[rank],
                         PADDLE_TRAINER_ENDPOINTS=','.join(ends), PADDLE_DISTRI_BACKEND='gloo', OMP_NUM_THREADS='1')
                    for rank in range(2)]
    return [subprocess.Popen(command(script, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment) for environment in environments]


def run_two(script, *flags):
    """`run` with two processes, -> [CompletedProcess] by rank."""
    started = start_two(script, *flags)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda process: process.communicate(timeout=300), started))
    return [subprocess.CompletedProcess(process.args, process.returncode, *output)
            for process, output in zip(started, outputs)]


def run_two_well(script, *flags):
    """Runs a script that has to succeed in two processes, -> what the main one printed; the other has to be silent."""
    main, other = run_two(script, *flags)
    assert main.returncode == other.returncode == 0, main.stderr + other.stderr
    assert not other.stdout and not other.stderr, other.stdout + other.stderr
    return main.stdout


def launch(logs, script, *flags):
    """Starts a script with two processes as its user does, -> Popen; stdout has launch's words and the main one's."""
    return subprocess.Popen(
        [sys.executable, '-m', 'paddle.distributed.launch', '--nproc_per_node', '2', '--log_dir', str(logs),
         *command(script, *flags)[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


def last_checkpoint(folder):
    """What the last checkpoint of a folder holds, with what time alone decides taken out."""
    name = checkpoint_names(folder)[-1]
    metadata, state = read_checkpoint(os.path.join(folder, name))
    metadata['meter'].pop('seconds')
    return name, metadata, {key: array.tobytes() for key, array in state.items()}
