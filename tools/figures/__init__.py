"""The figures of visualize.py, one module each. A module has

SUFFIXES: what the files that it makes add to the name of --output, without its .png; the picture first;
add_arguments(parser): its options;
draw(args): the files' contents, figures and texts, in the order of SUFFIXES. Raises UserError.
"""
