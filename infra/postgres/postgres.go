// Package postgres answers the question "how do events become rows that can be queried?". It is the projection engine:
// it runs the read models of package projections on Postgres.
//
// Read engine.go first (what runs where), then task.go (one read model in one partition number: read, fold, write rows
// and positions in one transaction), build.go (a read model's tables are never changed, only built anew and swapped in)
// and replay.go (how a build is filled). This file opens the database.
//
// In the database, the schema wharf holds the engine's own tables (migrations/), each build has a schema wharf_build_N,
// and wharf_read holds the views on the live ones, the only thing that the role wharf_query may read.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"time"

	"github.com/exaring/otelpgx"
	fastjson "github.com/go-json-experiment/json/v1"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
	pgxuuid "github.com/vgarvardt/pgx-google-uuid/v5"
)

// QueryRole is the role that can read the views and do nothing else.
const QueryRole = "wharf_query"

const (
	connectTimeout = 5 * time.Second
	queryTimeout   = "15s" // of one statement of a query service, as a last resort: requests have their own time-out
	idleTimeout    = "60s" // after which a transaction that does nothing is ended: its owner has stopped
)

// Open connects to the database for the engine, as its owner. A database that does not answer is waited for until ctx
// ends. The pool may have 24 connections, for three writers of every read model and what looks after them; pool_max_conns in the URL asks
// for more. Commits do not wait for the disk: rows and positions are lost together or not at all.
func Open(ctx context.Context, url string) (*pgxpool.Pool, error) {
	return open(ctx, url, "owner", func(c *pgxpool.Config) {
		c.MaxConns = max(c.MaxConns, 24)
		c.ConnConfig.RuntimeParams["synchronous_commit"] = "off"
		c.ConnConfig.RuntimeParams["idle_in_transaction_session_timeout"] = idleTimeout
	})
}

// OpenQuery connects to the database for queries, as the role wharf_query, which the user of the URL must be or be a
// member of; Engine.Setup makes the role, and its user a member. A database that does not answer, or does not know the
// role yet, is waited for until ctx ends.
func OpenQuery(ctx context.Context, url string) (*pgxpool.Pool, error) {
	return open(ctx, url, QueryRole, func(c *pgxpool.Config) {
		c.ConnConfig.RuntimeParams["default_transaction_read_only"] = "on"
		c.ConnConfig.RuntimeParams["statement_timeout"] = queryTimeout
		c.ConnConfig.RuntimeParams["idle_in_transaction_session_timeout"] = idleTimeout
		types := c.AfterConnect
		c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			if err := types(ctx, conn); err != nil {
				return err
			}
			_, err := conn.Exec(ctx, "SET ROLE "+QueryRole)
			return err
		}
	})
}

func open(ctx context.Context, url, role string, adjust func(*pgxpool.Config)) (*pgxpool.Pool, error) {
	c, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("the database URL: %w", err) // pgx leaves the password out
	}
	c.MaxConns = max(c.MaxConns, 8)
	c.MaxConnIdleTime = 5 * time.Minute
	c.HealthCheckPeriod = 15 * time.Second
	c.ConnConfig.ConnectTimeout = connectTimeout
	c.ConnConfig.Tracer = otelpgx.NewTracer()
	maps.Copy(c.ConnConfig.RuntimeParams, map[string]string{
		"application_name": "wharf-" + role,
		// The server gives up a client that is gone without a word, and the locks that it holds: one that has died, or sees
		// the server over another connection by now. Where it waits for an answer only tcp_user_timeout counts.
		"tcp_keepalives_idle": "15", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3", "tcp_user_timeout": "30000",
	})
	c.AfterConnect = func(_ context.Context, conn *pgx.Conn) error {
		pgxuuid.Register(conn.TypeMap()) // else a UUID goes by its text
		conn.TypeMap().RegisterType(&pgtype.Type{Name: "json", OID: pgtype.JSONOID,
			Codec: &pgtype.JSONCodec{Marshal: fastjson.Marshal, Unmarshal: fastjson.Unmarshal}}) // as projections does
		conn.TypeMap().RegisterType(&pgtype.Type{Name: "timestamptz", OID: pgtype.TimestamptzOID,
			Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC}}) // as events have it, or a key would not equal itself
		return nil
	}
	adjust(c)
	pool, err := pgxpool.NewWithConfig(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	for retry := (backoff{}); ; {
		err := pool.Ping(ctx)
		if err == nil {
			return pool, nil
		}
		if retry.tries == 5 {
			slog.Warn("the database cannot be opened, and is tried again", "err", err)
		}
		if !retry.sleep(ctx) {
			pool.Close()
			if errors.Is(err, context.DeadlineExceeded) {
				err = fmt.Errorf("nobody answers at %s: %w", net.JoinHostPort(c.ConnConfig.Host, fmt.Sprint(c.ConnConfig.Port)), err)
			}
			return nil, fmt.Errorf("open the database: %w", err)
		}
	}
}

// backoff is the pauses between tries.
type backoff struct{ tries int }

const (
	firstPause = 50 * time.Millisecond
	mostPause  = 3 * time.Second
)

// sleep is false when ctx ended first.
func (b *backoff) sleep(ctx context.Context) bool {
	d := min(mostPause, firstPause<<min(b.tries, 10))
	b.tries++
	return pause(ctx, d)
}

// pause is false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
