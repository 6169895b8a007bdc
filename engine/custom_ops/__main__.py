"""Compiles the operators into a folder: python -m engine.custom_ops FOLDER, for `compile_to`.

Runs the build itself, because cpp_extension.load runs it by a shell command that breaks at a space in a path.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from paddle.utils.cpp_extension import BuildExtension, CppExtension, setup

import utils
from engine.custom_ops import FLAGS, SOURCES


class ParallelBuild(BuildExtension):
    """Compiles as many sources at the same time as there are cores: Paddle 2.6 compiles one after the other."""

    def build_extension(self, extension) -> None:
        compile_sources = self.compiler.compile

        def compile_in_parallel(sources, **settings) -> list[str]:
            with ThreadPoolExecutor(min(utils.cores(), len(sources))) as pool:
                return list(chain(*pool.map(lambda source: compile_sources([source], **settings), sources)))

        self.compiler.compile = compile_in_parallel
        super().build_extension(extension)


folder = os.path.abspath(sys.argv[1])
os.chdir(folder)
sys.argv[1:] = ['build']
# The largest source first: if it started last, the other cores would be idle until it is compiled.
setup(name='darts_ops',
      ext_modules=CppExtension(sources=sorted(SOURCES, key=os.path.getsize, reverse=True),
                               extra_compile_args={'cxx': FLAGS}, extra_link_args=['-fopenmp']),
      cmdclass={'build_ext': ParallelBuild.with_options(output_dir=folder, no_python_abi_suffix=True)})
