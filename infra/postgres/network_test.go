package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"wharf/domain/inventory"
	"wharf/projections"
)

// network is between an engine and Postgres.
type network struct {
	refuses, silent, readOnly atomic.Bool

	mu    sync.Mutex
	conns map[*wire]bool
}

// wire is a connection. One that is dead takes what is sent, and says nothing, as when a firewall has forgotten it.
type wire struct {
	net.Conn
	of            *network
	waiting, dead bool // for an answer
}

// behind is a pool of the same database behind a network.
func behind(t testing.TB, pool *pgxpool.Pool) (*network, *pgxpool.Pool) {
	t.Helper()
	n := &network{conns: map[*wire]bool{}}
	config := pool.Config()
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if n.refuses.Load() {
			return nil, errors.New("refused")
		}
		if n.silent.Load() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		w := &wire{Conn: c, of: n}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.conns[w] = true
		return w, nil
	}
	config.PrepareConn = func(ctx context.Context, c *pgx.Conn) (bool, error) {
		_, err := c.Exec(ctx, fmt.Sprint("SET default_transaction_read_only = ", n.readOnly.Load()))
		return err == nil, err
	}
	through, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(through.Close)
	t.Cleanup(func() { // or pgx would wait for the last words of the dead
		n.mu.Lock()
		defer n.mu.Unlock()
		for w := range n.conns {
			_ = w.Conn.Close()
		}
	})
	return n, through
}

// kill lets connections die: all, or only those that wait for an answer.
func (n *network) kill(all bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for w := range n.conns {
		w.dead = w.dead || all || w.waiting
	}
}

func (w *wire) Write(p []byte) (int, error) {
	w.of.mu.Lock()
	w.waiting = true
	dead := w.dead
	w.of.mu.Unlock()
	if dead {
		return len(p), nil
	}
	return w.Conn.Write(p)
}

func (w *wire) Read(p []byte) (int, error) {
	for {
		n, err := w.Conn.Read(p)
		w.of.mu.Lock()
		w.waiting = false
		dead := w.dead
		w.of.mu.Unlock()
		if !dead || err != nil {
			return n, err
		}
	}
}

func (w *wire) Close() error {
	w.of.mu.Lock()
	delete(w.of.conns, w)
	w.of.mu.Unlock()
	return w.Conn.Close()
}

// A projector that cannot write to the database lets others have its tasks, and comes back.
func TestWhoLosesTheDatabaseLetsGoOfItsTasks(t *testing.T) {
	for what, set := range map[string]func(n *network, away bool){
		"refuses":   func(n *network, away bool) { n.refuses.Store(away); n.kill(away) },
		"silent":    func(n *network, away bool) { n.silent.Store(away); n.kill(away) },
		"read-only": func(n *network, away bool) { n.readOnly.Store(away) },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := newShop()
			s.stock(10)
			pool := openTest(t)
			n, through := behind(t, pool)
			var kafka groups
			first := newEngine(t, through, s, func(c *Config) { c.Lost, c.Grace = 300*time.Millisecond, 40*time.Millisecond })
			startWith(t, first, kafka.share)
			s.caughtUp(t, pool)
			stop := startWith(t, newEngine(t, pool, s), kafka.share)
			set(n, true)
			eventually(t, "the first has lost the database", func() bool { return first.Ready() != nil })
			s.stock(20)
			s.caughtUp(t, pool)
			set(n, false)
			stop()
			s.stock(30)
			s.caughtUp(t, pool)
			eventually(t, "the first is ready again", func() bool { return first.Ready() == nil })
		})
	}
}

// Who may not ask which database it is runs nothing, and is not ready.
func TestWhoCannotNameItsGroupsIsNotReady(t *testing.T) {
	s := newShop()
	s.stock(10)
	pool := openTest(t)
	rename := func(from, to string) {
		t.Helper()
		if _, err := pool.Exec(context.Background(), "ALTER FUNCTION pg_catalog."+from+"() RENAME TO "+to); err != nil {
			t.Fatal(err)
		}
	}
	rename("pg_control_system", "away") // of this database alone
	e := newEngine(t, pool, s)
	start(t, e)
	eventually(t, "it says so", func() bool { err := e.Ready(); return err != nil && strings.Contains(err.Error(), "pg_control_system") })
	rename("away", "pg_control_system")
	s.caughtUp(t, pool)
	if err := e.Ready(); err != nil {
		t.Error(err)
	}
}

// Somebody who holds the tasks' rows for long stops them, and nothing else: the projector reaches the database all the time.
func TestALockOnTheTasksMakesNobodyLeave(t *testing.T) {
	t.Parallel()
	s := newShop()
	s.stock(30)
	pool := openTest(t)
	e := newEngine(t, openURL(t, pool.Config().ConnString()), s, func(c *Config) { c.Lost = 300 * time.Millisecond })
	var joined atomic.Int64
	startWith(t, e, func(ctx context.Context, name string, topics []string, owned func(context.Context, int32)) error {
		joined.Add(1)
		runIn(ctx, owned, allPartitions...)
		return nil
	})
	s.caughtUp(t, pool)
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(t.Context(), "SELECT FROM wharf.tasks FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	before := joined.Load()
	for i := range 90 {
		s.order(i, 1)
	}
	s.stock(60)
	pause(t.Context(), 30*e.Lost) // three times as long as a transaction may take
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.caughtUp(t, pool)
	if n := joined.Load() - before; n > 0 {
		t.Errorf("it left its groups and joined again %d times", n)
	}
}

// The server gives up a client that is gone without a word, with the locks that it holds.
func TestTheServerGivesUpWhoIsGone(t *testing.T) {
	if got := one[string](t, openTest(t), "SELECT current_setting('tcp_user_timeout') || ', ' || current_setting('tcp_keepalives_idle')"); got != "30000, 15" {
		t.Errorf("the time-outs are %s", got)
	}
}

// A task whose connection leads to nowhere goes on over another one, although the database has been reached all the time.
func TestATaskOnADeadConnectionGoesOn(t *testing.T) {
	s := newShop()
	s.stock(10)
	pool := openTest(t)
	n, through := behind(t, pool)
	start(t, newEngine(t, through, s, func(c *Config) {
		c.Lost, c.Models = 300*time.Millisecond, []projections.Model{projections.Stock}
	}))
	s.caughtUp(t, pool)
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT FROM wharf.tasks FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	for _, sku := range []string{"A", "B", "C", "D", "E"} {
		s.tell(sku, inventory.Received{Quantity: 1})
	}
	eventually(t, "as many tasks as may write at a time wait for the lock", func() bool {
		return one[int](t, pool, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%wharf.advance%'`) >= liveWriters
	})
	n.kill(false)
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.caughtUp(t, pool)
}
