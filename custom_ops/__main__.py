"""Compiles the operators into a folder: python -m custom_ops FOLDER. For custom_ops.compile_to."""
import sys

from paddle.utils import cpp_extension

from custom_ops import FLAGS, SOURCES

cpp_extension.load(name='darts_ops', sources=SOURCES, extra_cxx_cflags=FLAGS, extra_ldflags=['-fopenmp'],
                   build_directory=sys.argv[1])
