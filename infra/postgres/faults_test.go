package postgres

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"wharf/projections"
)

// troubles are the codes of errors that a database may come up with at any moment: a serialization failure, a deadlock,
// a full disk, no memory, too many connections, a statement that took too long, the administrator's word.
var troubles = []string{"40001", "40P01", "53100", "53200", "53300", "57014", "57P01"}

// Whatever goes wrong in the database, again and again, while projectors come and go 50 times and read models are
// replayed: in the end positions and rows are those of the log.
func TestPositionsAndRowsAgreeWhateverGoesWrong(t *testing.T) {
	s := newShop()
	s.stock(20)
	for i := range 40 {
		s.order(i, 3)
	}
	pool := openTest(t)
	admin := openURL(t, pool.Config().ConnString())
	newEngine(t, pool, s)
	exec := func(sql string) {
		t.Helper()
		if _, err := admin.Exec(context.Background(), sql); err != nil {
			t.Fatal(err)
		}
	}
	// One transaction in three fails, some before the position is moved, some after; all of these are rolled back.
	body := "BEGIN IF random() < 0.17 THEN CASE floor(random() * %d)::int\n"
	for i, code := range troubles {
		body += fmt.Sprintf("WHEN %d THEN RAISE EXCEPTION 'trouble' USING ERRCODE = '%s';\n", i, code)
	}
	body += "ELSE NULL; END CASE; END IF; RETURN NULL; END"
	exec("CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS $$" + fmt.Sprintf(body, len(troubles)) + "$$")
	for _, when := range []string{"BEFORE", "AFTER"} {
		exec("CREATE TRIGGER trouble_" + when + " " + when + " UPDATE ON wharf.tasks FOR EACH STATEMENT EXECUTE FUNCTION trouble()")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var others sync.WaitGroup
	replayer := newEngine(t, openURL(t, pool.Config().ConnString()), s)
	others.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			// Most of these fail; that they do no harm is all that is asked of them.
			_ = replayer.Replay(ctx, []string{projections.All[i%len(projections.All)].Name}, ReplayOptions{}, func(Progress) {})
		}
	})
	for round := range 50 {
		s.order(100+round, 3)
		seen := one[int64](t, admin, "SELECT sum(o)::bigint FROM wharf.tasks, unnest(offsets) o")
		own := openURL(t, pool.Config().ConnString())
		e := New(own, replayer.Config)
		stop := start(t, e)
		if round%5 == 0 {
			exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		}
		if round%5 == 1 {
			exec(`SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		}
		eventually(t, "some progress", func() bool {
			return one[int64](t, admin, "SELECT sum(o)::bigint FROM wharf.tasks, unnest(offsets) o") > seen+20
		})
		stop()
		own.Close()
		for of, turns := range e.turns {
			all := map[string]int64{live: liveWriters, previous: previousWriters}[of.state]
			eventually(t, "all turns of "+of.model+" have been given back", func() bool { return turns.TryAcquire(all) })
		}
	}
	cancel()
	others.Wait()
	exec("DROP FUNCTION trouble CASCADE")
	pool.Reset() // its connections have been cut, too
	e := newEngine(t, pool, s)
	start(t, e)
	s.caughtUp(t, pool)
	verify(t, e, 0)
	for _, m := range projections.All {
		if diff := cmp.Diff(foldOf(t, m, s), rowsOf(t, m, pool)); diff != "" {
			t.Errorf("%s: the rows are not those of the log (-want +got):\n%s", m.Name, diff)
		}
	}
	if n := one[int64](t, pool, "SELECT count(*) FROM wharf_read.builds WHERE state = 'live' AND (error <> '' OR parked > 0)"); n != 0 {
		t.Errorf("%d tasks are halted or have parked events", n)
	}
	eventually(t, "the last trouble can be seen", func() bool {
		return one[int64](t, pool, "SELECT count(*) FROM wharf.tasks WHERE trouble <> ''") > 0
	})
}
