"""stub"""


def write_for_genai(folder, where):
    return []
