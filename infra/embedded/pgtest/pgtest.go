// Package pgtest answers the question "where does a test get a database?". One real Postgres server runs per test
// process, started by the first test that asks, and every test gets an empty database of its own in it.
package pgtest

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"wharf/infra/embedded"
)

// Variable names the environment variable that makes tests use a server that runs already. Its value is the URL of a
// database there whose user may create others.
const Variable = "WHARF_TEST_DATABASE_URL"

const timeout = time.Minute

// server is never stopped: it ends, and its files go, with the process.
var server = sync.OnceValues(func() (string, error) {
	if given := os.Getenv(Variable); given != "" {
		return given, nil
	}
	dir, err := os.MkdirTemp("", "wharf-pgtest-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // run by root, the server is another user
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	p, err := embedded.StartPostgres(ctx, dir, slog.New(slog.DiscardHandler), embedded.Ephemeral())
	if err != nil {
		return "", err
	}
	return p.URL(), nil
})

// IgnoreServer is for tests that look for leaked goroutines: the one that waits for the server's end is none.
func IgnoreServer() goleak.Option {
	return goleak.IgnoreAnyFunction("wharf/infra/embedded.(*Postgres).watch")
}

// TestDatabase returns the URL of a new, empty database, which is dropped when the test ends.
func TestDatabase(t testing.TB) string {
	t.Helper()
	base, err := server()
	if err != nil {
		t.Fatalf("no Postgres to test with: %v", err)
	}
	u, err := url.Parse(base)
	if err != nil {
		t.Fatalf("%s: %v", Variable, err)
	}
	name := fmt.Sprintf("wharf_test_%x", [16]byte(uuid.New()))
	execute(t, base, "CREATE DATABASE "+name)
	t.Cleanup(func() { execute(t, base, "DROP DATABASE "+name+" WITH (FORCE)") })
	u.Path = "/" + name
	return u.String()
}

func execute(t testing.TB, database, statement string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, database)
	if err != nil {
		t.Fatalf("connect to the test server: %v", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, statement); err != nil {
		t.Errorf("%s: %v", statement, err)
	}
}
