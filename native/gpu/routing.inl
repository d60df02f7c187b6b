// Which experts compute a row.
