"""Annotation in Label Studio: server, client, labelling page, brush codec, tasks, answers and their agreement."""
