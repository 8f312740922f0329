package postgres

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"wharf/projections"
)

// ErrReplaying says that somebody else is building the read model anew.
var ErrReplaying = errors.New("the read model is being built anew already")

// Phase is what a replay is doing.
type Phase string

// The phases of a replay, in order.
const (
	PhaseReading  Phase = "reading"
	PhaseIndexing Phase = "indexing"
	PhaseSwapping Phase = "swapping"
	PhaseDone     Phase = "done"
)

// Progress is how far the replay of one read model is.
type Progress struct {
	Model string
	Build int64
	Phase Phase
	Done  int64 // records read
	Total int64 // there were when it began
}

const (
	// How long a swap may hold up the live tasks while the new build catches up with them for the last time, and how
	// long it may make queries wait behind it for a view that a long query still uses.
	swapCatchUp   = 5 * time.Second
	swapLock      = 100 * time.Millisecond
	swapTries     = 100
	cleanUpWithin = 10 * time.Second
)

// Replay builds the named read models anew, one after the other, beside the live builds, and swaps each in when it is
// where the live one is. Queries and live projection go on, and never see less than before. When it fails or is killed,
// the live build stays as it is, and those that were swapped in before stay too. It needs no Run, and no Setup beyond
// the one that made the live builds. progress is called by one goroutine at a time, though not always the same, and has
// to be quick. The error is ErrReplaying when somebody else is building the read model.
func (e *Engine) Replay(ctx context.Context, names []string, progress func(Progress)) error {
	var models []projections.Model
	for _, name := range names {
		i := slices.IndexFunc(e.Models, func(m projections.Model) bool { return m.Name == name })
		if i < 0 {
			var known []string
			for _, m := range e.Models {
				known = append(known, m.Name)
			}
			return fmt.Errorf("there is no read model %q: there are %s", name, strings.Join(known, ", "))
		}
		models = append(models, e.Models[i])
	}
	for _, m := range models {
		if err := e.replay(ctx, m, progress); err != nil {
			return fmt.Errorf("build %s anew: %w", m.Name, err)
		}
	}
	return nil
}

// replay is one model's.
func (e *Engine) replay(ctx context.Context, m projections.Model, progress func(Progress)) (err error) {
	// What was retired or left unfinished would only be in the way. This comes before the lock, which it respects.
	if err := e.sweep(ctx); err != nil {
		return err
	}
	// A pool of its own, because the swap holds up live tasks, which may have taken every connection of the engine's.
	config := e.pool.Config()
	config.MaxConns, config.MinConns, config.MinIdleConns = int32(runtime.GOMAXPROCS(0))+2, 0, 0
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return err
	}
	defer pool.Close()
	// The connection holds the lock for as long as it lives, and the swap is done on it: who lost the lock cannot swap.
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	class, object := modelLock(m.Name)
	var ours bool
	if err := conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1, $2)", class, object).Scan(&ours); err != nil {
		return err
	}
	if !ours {
		return ErrReplaying
	}
	defer unlock(ctx, conn, class, object)

	r := replay{e: e, model: m, pool: pool, conn: conn, report: Progress{Model: m.Name}, progress: progress}
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) (err error) {
		r.build, err = e.create(ctx, tx, m)
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.abandon(ctx))
		}
	}()
	return r.run(ctx)
}

// replay is one new build of a read model in the making.
type replay struct {
	e     *Engine
	model projections.Model
	build build
	pool  *pgxpool.Pool
	conn  *pgxpool.Conn
	tasks []*task

	mu       sync.Mutex
	report   Progress
	progress func(Progress)
}

func (r *replay) run(ctx context.Context) error {
	r.report.Build = r.build.id
	for p := range int32(r.e.Partitions) {
		t, err := r.e.load(ctx, r.pool, r.model, r.build, p)
		if err != nil {
			return err
		}
		t.moved = r.moved
		r.tasks = append(r.tasks, t)
	}
	ends, err := r.ends(ctx)
	if err != nil {
		return err
	}
	for _, until := range ends {
		for _, offset := range until {
			r.report.Total += offset
		}
	}
	r.tell(PhaseReading)
	if err := r.advance(ctx, ends); err != nil {
		return err
	}
	r.tell(PhaseIndexing)
	err = pgx.BeginFunc(ctx, r.conn, func(tx pgx.Tx) error { return finish(ctx, tx, r.model, r.build) })
	if err != nil {
		return err
	}
	r.tell(PhaseSwapping)
	for retry := (backoff{}); ; {
		// What has come in meanwhile, or during the last try, while nobody waits for it.
		if ends, err = r.ends(ctx); err == nil {
			err = r.advance(ctx, ends)
		}
		if err != nil {
			return err
		}
		err = r.swap(ctx)
		if err == nil {
			break
		}
		passing := isCode(err, codeLockNotAvailable) || errors.Is(err, errTooSlow)
		if !passing || retry.tries == swapTries {
			return fmt.Errorf("swap: %w", err)
		}
		if !retry.sleep(ctx) {
			return ctx.Err()
		}
	}
	r.tell(PhaseDone)
	return nil
}

// ends is where the topics end, per partition and topic.
func (r *replay) ends(ctx context.Context) ([][]int64, error) {
	ends := make([][]int64, r.e.Partitions)
	g, ctx := errgroup.WithContext(ctx)
	for p := range ends {
		ends[p] = make([]int64, len(r.model.Topics))
		for i, topic := range r.model.Topics {
			g.Go(func() (err error) {
				ends[p][i], err = r.e.Source(topic).End(ctx, int32(p))
				return err
			})
		}
	}
	return ends, g.Wait()
}

// advance brings the new build to these offsets, or beyond.
func (r *replay) advance(ctx context.Context, until [][]int64) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for p, t := range r.tasks {
		g.Go(func() error { return t.run(ctx, until[p]) })
	}
	return g.Wait()
}

var errTooSlow = errors.New("the new build does not catch up with the live one")

// swap makes the new build the live one, at a moment at which it is nowhere behind the old one. For that the old
// build's tasks are held up; they lose nothing, for the new build's tasks go on from its own positions.
func (r *replay) swap(ctx context.Context) error {
	return pgx.BeginFunc(ctx, r.conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", swapLock.Milliseconds())); err != nil {
			return err
		}
		until, err := r.livePositions(ctx, tx)
		if err != nil {
			return err
		}
		catching, cancel := context.WithTimeoutCause(ctx, swapCatchUp, errTooSlow)
		defer cancel()
		if err := r.advance(catching, until); err != nil {
			if catching.Err() != nil && ctx.Err() == nil {
				// A task that was stopped in the middle of a transaction does not know where it is.
				return errors.Join(errTooSlow, r.reload(ctx))
			}
			return err
		}
		return publish(ctx, tx, r.model, r.build)
	})
}

// livePositions locks the live build's tasks and says where they are, in the new build's order of topics. A topic that
// the live build does not listen to counts as not begun.
func (r *replay) livePositions(ctx context.Context, tx pgx.Tx) ([][]int64, error) {
	until := make([][]int64, len(r.tasks))
	for p := range until {
		until[p] = make([]int64, len(r.model.Topics))
	}
	rows, err := tx.Query(ctx, `SELECT t.partition, b.topics, t.offsets
		FROM wharf.tasks t JOIN wharf.builds b ON b.id = t.build
		WHERE b.model = $1 AND b.state = 'live' ORDER BY t.partition FOR UPDATE OF t`, r.model.Name)
	if err != nil {
		return nil, err
	}
	var partition int32
	var topics []string
	var offsets []int64
	_, err = pgx.ForEachRow(rows, []any{&partition, &topics, &offsets}, func() error {
		for i, topic := range topics {
			if j := slices.Index(r.model.Topics, topic); j >= 0 {
				until[partition][j] = offsets[i]
			}
		}
		return nil
	})
	return until, err
}

// reload makes the tasks anew, from their stored positions.
func (r *replay) reload(ctx context.Context) error {
	for p := range r.tasks {
		t, err := r.e.load(ctx, r.pool, r.model, r.build, int32(p))
		if err != nil {
			return err
		}
		t.moved = r.moved
		r.tasks[p] = t
	}
	return nil
}

// abandon drops the unfinished build. If it cannot, the next sweep does.
func (r *replay) abandon(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpWithin)
	defer cancel()
	return pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error { return drop(ctx, tx, r.build) })
}

func (r *replay) moved(records, _ int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Done += records
	r.report.Total = max(r.report.Total, r.report.Done)
	r.progress(r.report)
}

func (r *replay) tell(p Phase) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Phase = p
	r.progress(r.report)
}
