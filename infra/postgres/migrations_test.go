package postgres

import (
	"context"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
)

// A new program migrates while queries read the views of the old one: none of them fails, nor does the migration.
func TestAMigrationAndQueriesDoNotGetInEachOthersWay(t *testing.T) {
	for range 5 {
		pool := openTest(t)
		if _, err := pool.Exec(t.Context(), "CREATE SCHEMA wharf"); err != nil {
			t.Fatal(err)
		}
		files, err := fs.Sub(migrations, "migrations")
		if err != nil {
			t.Fatal(err)
		}
		db := stdlib.OpenDBFromPool(pool)
		t.Cleanup(func() { _ = db.Close() })
		old, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithTableName("wharf.migrations"), goose.WithDisableGlobalRegistry(true))
		if err == nil {
			_, err = old.UpTo(t.Context(), 2)
		}
		if err != nil {
			t.Fatal(err)
		}
		query, err := OpenQuery(t.Context(), pool.Config().ConnString())
		if err != nil {
			t.Fatal(err)
		}
		ctx, enough := context.WithCancel(t.Context())
		var all sync.WaitGroup
		t.Cleanup(func() { enough(); all.Wait(); query.Close() })
		var asked atomic.Int64
		for range 3 {
			all.Go(func() {
				p := NewPositions(query)
				for ctx.Err() == nil {
					if _, err := p.read([]string{"orders"}); err != nil {
						t.Error(err)
					}
					asked.Add(1)
				}
			})
		}
		eventually(t, "queries are under way", func() bool { return asked.Load() > 20 })
		if err := New(pool, Config{}).migrate(t.Context()); err != nil {
			t.Error(err)
		}
		enough()
		all.Wait()
	}
}
