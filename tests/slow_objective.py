"""An objective of a module that takes long to import."""

import time

import objectives

time.sleep(1.5)


def crashes(weights):
    return objectives.crashes(weights)
