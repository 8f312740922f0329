package pgtest

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, IgnoreServer()) }

func TestEveryTestGetsADatabaseOfItsOwn(t *testing.T) {
	ctx := context.Background()
	a, b := TestDatabase(t), TestDatabase(t)
	if a == b {
		t.Fatalf("both are %s", a)
	}
	for _, u := range []string{a, b} {
		conn, err := pgx.Connect(ctx, u)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(ctx)
		if _, err := conn.Exec(ctx, "CREATE TABLE mine (id int)"); err != nil {
			t.Error(err)
		}
	}
}
