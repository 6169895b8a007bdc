"""Compiles the operators into a folder: python -m engine.custom_ops FOLDER, for `compile_to`."""
import sys

from paddle.utils import cpp_extension

from engine.custom_ops import FLAGS, SOURCES

cpp_extension.load(name='darts_ops', sources=SOURCES, extra_cxx_cflags=FLAGS, extra_ldflags=['-fopenmp'],
                   build_directory=sys.argv[1])
