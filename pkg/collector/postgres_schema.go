package collector

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"time"
)

// postgresLayout is the version of the tables, kept in head.
const postgresLayout = 1

// What is of all days, and what each day begins with: the columns are those of SQLite's. Of head there is one row; whoever has it for update
// writes, so that there is one log and so that ids are in the order of commits.
const postgresTables = `
CREATE TABLE marks (
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL,
	seq BIGINT NOT NULL, lost BIGINT NOT NULL, received BIGINT NOT NULL,
	number BIGINT NOT NULL, seal BYTEA NOT NULL, breaks BIGINT NOT NULL,
	PRIMARY KEY (node, epoch, class)
);
CREATE TABLE keys (
	node TEXT NOT NULL, epoch TEXT NOT NULL,
	vkey TEXT NOT NULL, leaf BIGINT NOT NULL,
	PRIMARY KEY (node, epoch)
);
CREATE TABLE streams (node TEXT PRIMARY KEY, turn BIGINT NOT NULL);
CREATE TABLE hashes (idx BIGINT PRIMARY KEY, hash BYTEA NOT NULL);
CREATE TABLE days (day DATE PRIMARY KEY, base BIGINT NOT NULL);
CREATE TABLE head (
	one INTEGER PRIMARY KEY CHECK (one = 1),
	layout INTEGER NOT NULL, vkey TEXT NOT NULL,
	day DATE, base BIGINT NOT NULL, last_id BIGINT NOT NULL,
	size BIGINT NOT NULL, checkpoint BYTEA NOT NULL
);
CREATE TABLE leaves (
	day DATE NOT NULL, idx BIGINT NOT NULL, data BYTEA NOT NULL,
	PRIMARY KEY (idx, day)
) PARTITION BY RANGE (day);
CREATE TABLE batches (
	day DATE NOT NULL, leaf BIGINT NOT NULL,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL,
	number BIGINT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL,
	received BIGINT NOT NULL,
	PRIMARY KEY (leaf, day),
	UNIQUE (node, epoch, class, number, day)
) PARTITION BY RANGE (day);
CREATE INDEX batches_last ON batches (node, epoch, class, last);
CREATE TABLE flows (
	day DATE NOT NULL, id BIGINT NOT NULL,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq BIGINT NOT NULL,
	received BIGINT NOT NULL, time BIGINT NOT NULL,
	event TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL,
	service TEXT NOT NULL, identity TEXT NOT NULL, grant_id TEXT NOT NULL,
	client TEXT NOT NULL, client_port INTEGER NOT NULL, server TEXT NOT NULL, server_port INTEGER NOT NULL,
	data BYTEA NOT NULL,
	PRIMARY KEY (id, day),
	UNIQUE (node, epoch, class, seq, day)
) PARTITION BY RANGE (day);
CREATE INDEX flows_time ON flows (time, service);
CREATE INDEX flows_grant ON flows (grant_id) WHERE grant_id <> '';
CREATE INDEX flows_identity ON flows (identity, id) WHERE identity <> '';
CREATE INDEX flows_reason ON flows (reason, id) WHERE reason <> 'IDENTITY' AND reason <> 'CLOSED';
CREATE INDEX flows_verdict ON flows (verdict, id) WHERE verdict <> 'PROXIED';
CREATE TABLE grant_events (
	day DATE NOT NULL, id BIGINT NOT NULL,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq BIGINT NOT NULL,
	received BIGINT NOT NULL, time BIGINT NOT NULL,
	grant_id TEXT NOT NULL, step TEXT NOT NULL,
	leaf BIGINT,
	data BYTEA NOT NULL,
	PRIMARY KEY (id, day),
	UNIQUE (node, epoch, class, seq, day)
) PARTITION BY RANGE (day);
CREATE INDEX grant_events_grant ON grant_events (grant_id);
CREATE TABLE tides (
	day DATE NOT NULL, id BIGINT NOT NULL,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq BIGINT NOT NULL,
	received BIGINT NOT NULL, time BIGINT NOT NULL,
	grants TEXT NOT NULL, differing BOOLEAN NOT NULL,
	data BYTEA NOT NULL,
	PRIMARY KEY (id, day),
	UNIQUE (node, epoch, class, seq, day)
) PARTITION BY RANGE (day);
CREATE TABLE losses (
	day DATE NOT NULL, id BIGINT NOT NULL,
	node TEXT NOT NULL, epoch TEXT NOT NULL, class INTEGER NOT NULL, seq BIGINT NOT NULL,
	received BIGINT NOT NULL,
	stage TEXT NOT NULL, cause TEXT NOT NULL, count BIGINT NOT NULL, at_most BOOLEAN NOT NULL,
	data BYTEA NOT NULL,
	PRIMARY KEY (id, day),
	UNIQUE (node, epoch, class, seq, day)
) PARTITION BY RANGE (day);
`

// dated are the tables that have a partition for each day.
var dated = append([]string{"leaves", "batches"}, recordTables...)

// suffixOf is how the names of a day's partitions end.
func suffixOf(day string) string { return "_" + strings.ReplaceAll(day, "-", "") }

// partitions makes a day's, if that has not been done. They are attached when they are whole, for which nobody who reads has to be waited for.
func partitions(ctx context.Context, tx *sql.Tx, day string) error {
	begin, err := time.Parse(dayLayout, day)
	if err != nil {
		return err
	}
	var made bool
	if err := tx.QueryRowContext(ctx, `SELECT to_regclass($1) IS NOT NULL`, "leaves"+suffixOf(day)).Scan(&made); err != nil || made {
		return err
	}
	var q strings.Builder
	for _, t := range dated {
		fmt.Fprintf(&q, `CREATE TABLE %[1]s%[2]s (LIKE %[1]s INCLUDING ALL);
			ALTER TABLE %[1]s%[2]s ALTER day SET DEFAULT '%[3]s';
			ALTER TABLE %[1]s ATTACH PARTITION %[1]s%[2]s FOR VALUES FROM ('%[3]s') TO ('%[4]s');
		`, t, suffixOf(day), day, begin.AddDate(0, 0, 1).Format(dayLayout))
	}
	if _, err := tx.ExecContext(ctx, q.String()); err != nil {
		return fmt.Errorf("make the partitions of %s: %w", day, err)
	}
	return nil
}

// removeDay takes a day out of the list, and its partitions with it. It does nothing if another collector has done so.
func removeDay(ctx context.Context, tx *sql.Tx, day string) error {
	r, err := tx.ExecContext(ctx, `DELETE FROM days WHERE day = $1`, day)
	if err != nil {
		return err
	}
	if n, err := r.RowsAffected(); err != nil || n == 0 {
		return err
	}
	for _, t := range dated {
		if _, err := tx.ExecContext(ctx, `DROP TABLE IF EXISTS `+t+suffixOf(day)); err != nil {
			return err
		}
	}
	return nil
}
