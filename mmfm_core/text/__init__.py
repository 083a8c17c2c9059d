"""Free text: token ids, vocabularies, and the findings a report states."""
