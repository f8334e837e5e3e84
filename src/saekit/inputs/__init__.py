"""Inputs: texts, images, labelled data and the built-in corpus, from wherever they lie."""
