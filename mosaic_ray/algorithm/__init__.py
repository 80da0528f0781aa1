"""The shared mathematics: functions of tensors and arrays that know neither Ray nor files."""
