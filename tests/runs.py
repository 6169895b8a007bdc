"""Runs the scripts, in this process or in other processes, and reads the folders of their runs."""
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
from pathlib import Path
from unittest import mock

import kill_and_resume
import utils
from engine import custom_ops

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(script, *flags):
    return [sys.executable, os.path.join(ROOT, script), *map(str, flags)]


def run_in_process(script, *flags):
    """Runs a script's main() in this process, -> CompletedProcess like `run`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, 'argv', [script, *map(str, flags)])
    # `disabled` because it switches the operators back at the end: the script itself may switch them on.
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), custom_ops.disabled():
        try:
            utils.run(importlib.import_module(Path(script).stem).main)
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())


def output_of(script, *flags):
    """Runs a script's main() in this process, which has to succeed, -> stdout."""
    done = run_in_process(script, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(script, *flags):
    """Runs a script in a process, -> CompletedProcess with stdout and stderr as text."""
    return subprocess.run(command(script, *flags), capture_output=True, text=True)


def run_well(script, *flags):
    """Runs a script in a process, which has to succeed, -> stdout."""
    done = run(script, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_two(script, *flags):
    """Starts a script in two processes, with the environment that launch would set, -> [Popen] by rank."""
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]
    ends = ['{}:{}'.format(*end.getsockname()) for end in sockets]
    for end in sockets:
        end.close()
    environments = [dict(os.environ, PADDLE_TRAINERS_NUM='2', PADDLE_TRAINER_ID=str(rank),
                         PADDLE_RANK_IN_NODE=str(rank), PADDLE_CURRENT_ENDPOINT=ends[rank],
                         PADDLE_TRAINER_ENDPOINTS=','.join(ends), PADDLE_DISTRI_BACKEND='gloo', OMP_NUM_THREADS='1')
                    for rank in range(2)]
    return [subprocess.Popen(command(script, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment) for environment in environments]


def run_two(script, *flags):
    """Runs a script in two processes, -> [CompletedProcess] by rank."""
    started = start_two(script, *flags)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda process: process.communicate(timeout=300), started))
    return [subprocess.CompletedProcess(process.args, process.returncode, *output)
            for process, output in zip(started, outputs)]


def run_two_well(script, *flags):
    """Runs a script in two processes, which have to succeed, -> stdout of rank 0; rank 1 has to print nothing."""
    main, other = run_two(script, *flags)
    assert main.returncode == other.returncode == 0, main.stderr + other.stderr
    assert not other.stdout and not other.stderr, other.stdout + other.stderr
    return main.stdout


def launch(logs, script, *flags):
    """Starts a script in two processes with launch, -> Popen; stdout has the output of launch and of rank 0."""
    return subprocess.Popen(
        [sys.executable, '-m', 'paddle.distributed.launch', '--nproc_per_node', '2', '--log_dir', str(logs),
         *command(script, *flags)[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_at(text, script, *flags):
    """Runs a script and sends SIGTERM when it prints `text`; it has to end with the exit code of the signal."""
    with subprocess.Popen(command(script, *flags), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        for line in process.stdout:
            if text in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM


def assert_one_line(done, *reasons):
    """Asserts exit code 2 and one line on stderr that contains the reasons."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and 'Traceback' not in done.stderr, done.stderr
    for reason in reasons:
        assert reason in done.stderr


def history(folder):
    return [json.loads(line) for line in (folder / 'history.jsonl').read_text().splitlines()]


def without_seconds(folder):
    return kill_and_resume.results_of(folder)['history.jsonl']


def assert_equal_runs(folder, other):
    """Asserts that two finished runs are bit-identical: last checkpoint, history, genotype, weight files."""
    results = []
    for path in (folder, other):
        results.append(kill_and_resume.results_of(path))
        for name in ('names of the files', *checkpoint_names(path)[:-1]):
            del results[-1][name]
    assert results[0] == results[1]


def checkpoint_names(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith('checkpoint-'))


def last_checkpoint(folder):
    """Returns (name, metadata, state) of the last checkpoint of a folder, as of `kill_and_resume.results_of`."""
    name = checkpoint_names(folder)[-1]
    return name, *kill_and_resume.results_of(folder)[name]
