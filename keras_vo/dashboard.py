def draw(history, path):
    pass
