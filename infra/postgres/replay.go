package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"wharf/projections"
)

// ErrReplaying says that somebody else is building the read model anew, or repairing it. The error that wraps it says who.
var ErrReplaying = errors.New("the read model is being built anew or repaired already")

// ErrNoPrevious says that there is no build to go back to.
var ErrNoPrevious = errors.New("there is no previous build: none has been swapped out lately")

// ReplayOptions say what becomes of a new build.
type ReplayOptions struct {
	NoSwap bool // it is left beside the live one, to be looked at, for Config.Keep
	Force  bool // it is swapped in although it differs from the live one
	Lost   bool // it is made of what there is, although the live one has read beyond the end of the log

	upgrade bool // only if the live one is of a lower version
}

var errUpgraded = errors.New("the live build is of this program's version already")

// Phase is what a replay is doing.
type Phase string

// The phases of a replay, in order.
const (
	PhaseReading   Phase = "reading"
	PhaseIndexing  Phase = "indexing"
	PhaseVerifying Phase = "verifying"
	PhaseSwapping  Phase = "swapping"
	PhaseDone      Phase = "done"
)

// Progress is how far the replay of one read model is.
type Progress struct {
	Model string
	Build int64
	Phase Phase
	Done  int64 // records read
	Total int64 // there were when it began

	Partitions, PartitionsDone int // that have been read to where their end was

	Comparison *Comparison // with the live build, once there is one
	Table      string      // of the new build, in the last phase
	Rows       int64       // in it, of a part that is for inspection
	Parked     int64       // events that are missing from it, because they could not be applied, or wait for one
}

const (
	// How long a swap may hold up the live tasks while the new build catches up with them for the last time, and how
	// long it may make queries wait behind it for a view that a long query still uses.
	swapCatchUp   = 5 * time.Second
	swapLock      = 100 * time.Millisecond
	swapTries     = 100
	cleanUpWithin = 10 * time.Second
)

// models are those of the names, or an error that says which there are.
func (e *Engine) models(names []string) (models []projections.Model, err error) {
	for _, name := range names {
		m, err := projections.Find(e.Models, name)
		if err != nil {
			return nil, err
		}
		models = append(models, m)
	}
	return models, nil
}

// Replay builds the named read models anew, one after the other, beside the live builds, compares each with the live one
// at one position, and swaps it in. Queries and live projection go on, and never see less than before. When it fails or
// is killed, the live build stays as it is, and those that were swapped in before stay too. A live build of a newer program
// is not replaced. It needs no Run, and no Setup beyond the one that made the live builds. progress is called by one goroutine at a time, though not always the same,
// and has to be quick. The error is ErrReplaying when somebody else is building the read model, or a *DifferenceError.
func (e *Engine) Replay(ctx context.Context, names []string, o ReplayOptions, progress func(Progress)) error {
	models, err := e.models(names)
	if err != nil {
		return err
	}
	for _, m := range models {
		if err := e.replay(ctx, m, o, progress); err != nil {
			return fmt.Errorf("build %s anew: %w", m.Name, err)
		}
	}
	return nil
}

// replay is one model's.
func (e *Engine) replay(ctx context.Context, m projections.Model, o ReplayOptions, progress func(Progress)) (err error) {
	r, end, err := e.begin(ctx, m, progress, forReplay)
	if err != nil {
		return err
	}
	defer end(&err)
	r.lost, r.upgrade = o.Lost, o.upgrade
	old, _, err := r.livePositions(ctx, r.conn, "")
	switch {
	case err != nil:
		return err
	case o.upgrade && old.version >= m.Version:
		return errUpgraded
	case old.version > m.Version && !o.NoSwap:
		return otherVersion(old.version, m)
	}
	if err := r.fill(ctx); err != nil {
		return err
	}
	if err := r.index(ctx); err != nil {
		return err
	}
	c, err := r.compare(ctx)
	if err != nil {
		return fmt.Errorf("compare it with the live build: %w", err)
	}
	r.report.Comparison, r.report.Table = &c, r.build.table()
	if !c.Same() && !o.Force && !o.NoSwap {
		return &DifferenceError{c}
	}
	if o.NoSwap {
		err = r.keepAside(ctx)
	} else {
		r.tell(PhaseSwapping)
		if c.Same() && c.Version == m.Version { // made twice, with one result
			_, err = r.conn.Exec(ctx, verified, r.build.id, 0)
		}
		if err == nil {
			err = r.readOn(ctx)
		}
		if err == nil {
			err = r.swap(ctx)
		}
	}
	if err != nil {
		return err
	}
	r.tell(PhaseDone)
	return nil
}

// index makes the build's indexes. If one refuses a row, which live projection, where they are there before the rows, has parked,
// the build is made once more in that way.
func (r *replay) index(ctx context.Context) error {
	r.tell(PhaseIndexing)
	err := pgx.BeginFunc(ctx, r.conn, func(tx pgx.Tx) error { return finish(ctx, tx, r.model, r.build) })
	if !isRefusal(err) {
		return err
	}
	r.e.Logger.Warn("a row cannot be indexed: the build is made once more, with its indexes first", "model", r.model.Name, "err", err)
	err = pgx.BeginFunc(ctx, r.conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "TRUNCATE "+r.build.table()); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "DELETE FROM wharf.parked WHERE build = $1", r.build.id); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "UPDATE wharf.tasks SET skipped = 0, offsets = array_fill(0, ARRAY[$2::int]), seqs = array_fill(0, ARRAY[$2::int]) WHERE build = $1",
			r.build.id, len(r.build.topics))
		if err != nil {
			return err
		}
		return finish(ctx, tx, r.model, r.build)
	})
	if err == nil {
		err = r.load(ctx)
	}
	if err == nil {
		r.report.Done, r.report.Total, r.report.PartitionsDone = 0, 0, 0
		err = r.fill(ctx)
	}
	if err == nil {
		_, err = r.conn.Exec(ctx, "ANALYZE "+r.build.table())
	}
	return err
}

// Plan is what a replay of a read model would read and write.
type Plan struct {
	Model   string   `json:"name"`
	Build   int64    `json:"build"` // the live one
	Version int      `json:"version"`
	Topics  []string `json:"topics"`
	Events  int64    `json:"events"` // to read
	Rows    int64    `json:"rows"`   // to write, about: as many as there are
	Bytes   int64    `json:"bytes"`  // with indexes
}

// Plan says what a replay would read and write. It changes nothing.
func (e *Engine) Plan(ctx context.Context, names []string) (plans []Plan, err error) {
	models, err := e.models(names)
	if err != nil {
		return nil, err
	}
	for _, m := range models {
		r := &replay{e: e, model: m}
		old, until, err := r.livePositions(ctx, e.pool, "")
		if err == nil {
			err = r.ends(ctx, until, func(int64) bool { return true })
		}
		p := Plan{Model: m.Name, Build: old.id, Version: old.version, Topics: m.Topics}
		there := false
		if err == nil {
			there, err = old.hasTable(ctx, e.pool)
		}
		if there {
			err = e.pool.QueryRow(ctx, "SELECT count(*), pg_total_relation_size($1::regclass) FROM "+old.table(), old.table()).
				Scan(&p.Rows, &p.Bytes)
		}
		if err != nil {
			return nil, fmt.Errorf("plan a replay of %s: %w", m.Name, err)
		}
		for _, offsets := range until {
			for _, offset := range offsets {
				p.Events += offset
			}
		}
		plans = append(plans, p)
	}
	return plans, nil
}

// Rollback makes the previous build of the read model the live one again, and the live one the previous one. It is
// brought to where the live one is first, which takes no time while a projector of its version keeps it up to date.
func (e *Engine) Rollback(ctx context.Context, name string, progress func(Progress)) error {
	m, err := projections.Find(e.Models, name)
	if err != nil {
		return err
	}
	if err := e.rollback(ctx, m, progress); err != nil {
		return fmt.Errorf("roll %s back: %w", m.Name, err)
	}
	return nil
}

func (e *Engine) rollback(ctx context.Context, m projections.Model, progress func(Progress)) error {
	r, end, err := e.open(ctx, m, progress)
	if err != nil {
		return err
	}
	defer end()
	if err := r.lockModel(ctx); err != nil {
		return err
	}
	b, found, err := buildIn(ctx, r.conn, role{m.Name, previous})
	if err != nil {
		return err
	}
	if !found {
		return ErrNoPrevious
	}
	if b.version != m.Version {
		return fmt.Errorf("the previous build is of version %d, and this program has version %d: use the program that made it",
			b.version, m.Version)
	}
	r.build = b
	if err := r.canComeBack(ctx); err != nil {
		return err
	}
	// Or it may retire while it is brought up.
	kept, err := r.conn.Exec(ctx, "UPDATE wharf.builds SET keep_until = greatest(keep_until, now() + make_interval(secs => $2)) WHERE id = $1 AND state = 'previous'",
		r.build.id, e.Keep.Seconds())
	if err != nil {
		return err
	}
	if kept.RowsAffected() == 0 {
		return ErrNoPrevious
	}
	if err := r.load(ctx); err != nil {
		return err
	}
	r.report.Table = r.build.table()
	r.tell(PhaseSwapping)
	if err := r.swap(ctx); err != nil {
		return err
	}
	if err := r.conn.QueryRow(ctx, "SELECT count(*) FROM wharf.parked WHERE build = $1", r.build.id).Scan(&r.report.Parked); err != nil {
		r.e.Logger.Warn("what is parked in the build cannot be counted", "model", m.Name, "err", err) // it is live all the same
	}
	r.tell(PhaseDone)
	return nil
}

// canComeBack is an error if the previous build is none to go back to.
func (r *replay) canComeBack(ctx context.Context) error {
	wrong, err := r.e.whatIsWrong(ctx, r.conn, r.build)
	if err != nil {
		return err
	}
	if wrong != nil {
		return fmt.Errorf("the previous one is none to go back to: %w", wrong)
	}
	halted, err := r.conn.Query(ctx, "SELECT format('partition %s: %s', partition, error) FROM wharf.tasks WHERE build = $1 AND error <> '' ORDER BY partition LIMIT 1", r.build.id)
	if err != nil {
		return err
	}
	why, err := pgx.CollectRows(halted, pgx.RowTo[string])
	if err != nil {
		return err
	}
	if len(why) > 0 {
		return fmt.Errorf("the previous build %d is halted: %s", r.build.id, why[0])
	}
	old, found, err := buildIn(ctx, r.conn, role{r.model.Name, live})
	if err != nil {
		return err
	}
	if found { // it may be what is to be got rid of
		r.lost = r.e.ofThisLog(old) != nil
	}
	if old, _, err = r.livePositions(ctx, r.conn, ""); err != nil {
		return err
	}
	if ids := old.ids(); len(r.e.TopicIDs) == 0 { // there is no telling which of two logs is the one
		for i := range r.build.topics {
			if r.build.isOther(i, ids) {
				return errors.New("the previous build was made of other topics than the live one, and Kafka is away, which knows the right ones")
			}
		}
	}
	return nil
}

// open gives the replay connections of its own, because a swap holds up live tasks, which may have taken every
// connection of the engine's.
func (e *Engine) open(ctx context.Context, m projections.Model, progress func(Progress)) (*replay, func(), error) {
	config := e.pool.Config()
	config.MaxConns, config.MinConns, config.MinIdleConns = int32(e.Parallel)+3, 0, 0
	config.ConnConfig.RuntimeParams["application_name"] = whoami
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, nil, err
	}
	conn, err := pool.Acquire(ctx)
	if err != nil {
		pool.Close()
		return nil, nil, err
	}
	r := &replay{e: e, model: m, pool: pool, conn: conn, unreachable: map[topicPartition]int64{}, report: Progress{Model: m.Name, Partitions: e.Partitions}, progress: progress}
	return r, func() {
		// Who begins next must not find its locks; a connection that is closed gives them back, too, but a moment later.
		unlocking, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectTimeout)
		defer cancel()
		_, _ = conn.Exec(unlocking, "SELECT pg_advisory_unlock_all()")
		_ = conn.Hijack().Close(unlocking)
		pool.Close()
	}, nil
}

// begin makes an empty build for the purpose: for a replay nobody else may be at one. end gives everything back, and drops the build if there was an error.
func (e *Engine) begin(ctx context.Context, m projections.Model, progress func(Progress), purpose string) (
	r *replay, end func(*error), err error,
) {
	// What was left unfinished would only be in the way, and need not go.
	if err := e.sweep(ctx); err != nil {
		e.Logger.Warn("old builds cannot be dropped, and are tried again", "err", err)
	}
	r, closeAll, err := e.open(ctx, m, progress)
	if err != nil {
		return nil, nil, err
	}
	end = func(err *error) {
		if *err != nil && r.build.id != 0 {
			*err = errors.Join(*err, r.abandon(ctx))
		}
		closeAll()
	}
	r.quiet = purpose == forLooking
	if purpose == forReplay {
		if err = r.lockModel(ctx); err != nil {
			end(&err)
			return nil, nil, err
		}
	}
	err = pgx.BeginFunc(ctx, r.conn, func(tx pgx.Tx) (err error) {
		if r.build, err = e.create(ctx, tx, m, purpose); err != nil {
			return err
		}
		// While this connection lives, nobody sweeps the build away.
		_, err = tx.Exec(ctx, "SELECT pg_advisory_lock($1, $2)", buildLock, int32(r.build.id))
		return err
	})
	if err == nil {
		err = r.load(ctx)
	}
	if err != nil {
		end(&err)
		return nil, nil, err
	}
	return r, end, nil
}

// lockModel keeps everybody else from swapping a build of the model. The connection holds the lock for as long as it
// lives, and the swap is done on it: who lost the lock cannot swap.
func (r *replay) lockModel(ctx context.Context) error {
	class, object := modelLock(r.model.Name)
	var ours bool
	if err := r.conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1, $2)", class, object).Scan(&ours); err != nil || ours {
		return err
	}
	// Who holds it may have let go by now.
	var who string
	err := r.conn.QueryRow(ctx, `SELECT coalesce(string_agg(format(', by %s, since %s UTC', a.application_name,
			to_char(a.backend_start AT TIME ZONE 'UTC', 'HH24:MI:SS')), ''), '')
		FROM pg_locks l JOIN pg_stat_activity a USING (pid)
		WHERE l.locktype = 'advisory' AND l.granted AND l.classid::bigint = $1 AND l.objid::bigint = $2
			AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
		int64(uint32(class)), int64(uint32(object))).Scan(&who)
	if err != nil {
		return err
	}
	return fmt.Errorf("%w%s", ErrReplaying, who)
}

// replay is one build of a read model in the making, or on its way to be the live one.
type replay struct {
	e           *Engine
	model       projections.Model
	build       build
	pool        *pgxpool.Pool
	conn        *pgxpool.Conn
	tasks       []*task
	pace        pacer
	upgrade     bool                     // the live build is of another version, and may have lost tasks
	lost        bool                     // the live build may be beyond the end of the log, which is right
	unreachable map[topicPartition]int64 // where the live build is, and the log is not
	quiet       bool                     // about what is parked: for a build that is only looked at

	mu       sync.Mutex
	report   Progress
	progress func(Progress)
}

// load finds out where the build's tasks are.
func (r *replay) load(ctx context.Context) error {
	r.report.Build = r.build.id
	tasks := make([]*task, 0, r.e.Partitions)
	for p := range int32(r.e.Partitions) {
		t, err := r.e.load(ctx, r.pool, r.model, r.build, p)
		if err != nil {
			return err
		}
		t.moved = func(records, _ int64) { r.moved(ctx, records) }
		t.quiet = r.quiet
		tasks = append(tasks, t)
	}
	r.tasks = tasks // all of them or none: a swap brings up what is here
	return nil
}

// fill brings the build to where the live one is now.
func (r *replay) fill(ctx context.Context) error {
	_, until, err := r.livePositions(ctx, r.conn, "")
	if err == nil {
		err = r.within(ctx, until)
	}
	if err == nil {
		err = r.ends(ctx, until, func(offset int64) bool { return offset < 0 })
	}
	if err != nil {
		return err
	}
	for _, offsets := range until {
		for _, offset := range offsets {
			r.report.Total += offset
		}
	}
	r.tell(PhaseReading)
	return r.advance(ctx, until)
}

// within sees that the topics reach as far as the build is to be brought, or nobody would ever get there: a live build can
// be beyond the end of a topic that has lost records, or was made anew. Who has just become the leader of a partition may
// not know its end yet, so it is asked a few times.
func (r *replay) within(ctx context.Context, until [][]int64) error {
	r.leaveOut(until)
	for retry := (backoff{}); ; {
		ends, beyond, err := r.beyond(ctx, until)
		if err != nil || len(beyond) == 0 {
			return err
		}
		if retry.tries < endTries {
			if !retry.sleep(ctx) {
				return ctx.Err()
			}
			continue
		}
		for _, at := range beyond {
			live, end := &until[at.partition][at.topic], ends[at.partition][at.topic]
			if !r.lost {
				return fmt.Errorf("the live build has read %s partition %d up to offset %d, and the log ends at %d: it lost records, or the "+
					"topic was made anew. Restore it, or build of what is there (wharf replay --force)", r.model.Topics[at.topic], at.partition, *live, end)
			}
			r.unreachable[at] = *live
			*live = end
		}
		return nil
	}
}

// endTries are within some three seconds.
const endTries = 6

// topicPartition is a partition of one of the model's topics.
type topicPartition struct{ topic, partition int }

// leaveOut leaves out the places that are known to be beyond the end of the log.
func (r *replay) leaveOut(until [][]int64) {
	for at, offset := range r.unreachable {
		if until[at.partition][at.topic] == offset {
			until[at.partition][at.topic] = -1
		}
	}
}

// beyond says which places are beyond their topic's end, and where that is. Nobody is asked about a place that the build has
// come to.
func (r *replay) beyond(ctx context.Context, until [][]int64) (ends [][]int64, beyond []topicPartition, err error) {
	const ask = -1
	ends = make([][]int64, len(until))
	for p := range until {
		ends[p] = slices.Clone(until[p])
		for i := range ends[p] {
			if until[p][i] > r.tasks[p].at.offsets[i] {
				ends[p][i] = ask
			}
		}
	}
	if err := r.ends(ctx, ends, func(offset int64) bool { return offset == ask }); err != nil {
		return nil, nil, err
	}
	for p := range until {
		for i, end := range ends[p] {
			if until[p][i] > max(end, r.tasks[p].at.offsets[i]) {
				beyond = append(beyond, topicPartition{i, p})
			}
		}
	}
	return ends, beyond, nil
}

// readOn brings the build to where the topics end now, which finds out whether they can be read that far.
func (r *replay) readOn(ctx context.Context) error {
	_, until, err := r.livePositions(ctx, r.conn, "")
	if err == nil {
		err = r.ends(ctx, until, func(int64) bool { return true })
	}
	if err != nil {
		return err
	}
	return r.advance(ctx, until)
}

// ends puts where the topics end in the place of the offsets that are to be replaced.
func (r *replay) ends(ctx context.Context, offsets [][]int64, replace func(int64) bool) error {
	g, ctx := errgroup.WithContext(ctx)
	for p := range offsets {
		for i, topic := range r.model.Topics {
			if replace(offsets[p][i]) {
				g.Go(func() (err error) {
					offsets[p][i], err = r.e.Source(topic).End(ctx, int32(p))
					return err
				})
			}
		}
	}
	return g.Wait()
}

// advance brings the build to these offsets, or beyond.
func (r *replay) advance(ctx context.Context, until [][]int64) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(r.e.Parallel)
	for p, t := range r.tasks {
		g.Go(func() error {
			for {
				err := t.run(ctx, until[p])
				if !isCode(err, codeMoved) {
					r.through()
					if err == nil { // or rows of all partitions would be in memory in the end
						t.rows.release()
					}
					return err
				}
				// A projector keeps the build up to date, too: it is a previous one, or was.
				err = t.reload(ctx)
				if err == nil {
					err = r.stillAside(ctx)
				}
				if err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// stillAside is errSwapped if the build is nobody's to bring on any more: it has retired, or queries read it.
func (r *replay) stillAside(ctx context.Context) error {
	tag, err := r.pool.Exec(ctx, "SELECT FROM wharf.builds WHERE id = $1 AND state NOT IN ('live', 'retired')", r.build.id)
	if err == nil && tag.RowsAffected() == 0 {
		return errSwapped
	}
	return err
}

var errTooSlow = errors.New("the new build does not catch up with the live one")

// meet calls f at a moment at which the build is where the live one is (a previous one perhaps beyond), which stands
// still: its tasks are held up until the transaction ends. Before that it brings the build near, while nobody waits for
// it. f may be called again.
func (r *replay) meet(ctx context.Context, f func(tx pgx.Tx, live build) error) error {
	for retry := (backoff{}); ; {
		// What has come in meanwhile, or during the last try.
		_, until, err := r.livePositions(ctx, r.conn, "")
		if err == nil {
			err = r.within(ctx, until)
		}
		if err == nil {
			err = r.advance(ctx, until)
		}
		if err != nil {
			return err
		}
		err = r.tryToMeet(ctx, f)
		passing := isCode(err, codeLockNotAvailable) || errors.Is(err, errTooSlow)
		if !passing {
			return err
		}
		switch retry.tries {
		case 4:
			r.e.Logger.Warn("the live build cannot be met yet, because a long query or transaction is at it, or it moves too fast: it is tried again",
				"model", r.model.Name, "err", err)
		case swapTries:
			return fmt.Errorf("tried %d times: %w", swapTries, err)
		}
		if !retry.sleep(ctx) {
			return ctx.Err()
		}
	}
}

func (r *replay) tryToMeet(ctx context.Context, f func(tx pgx.Tx, live build) error) error {
	return pgx.BeginFunc(ctx, r.conn, func(tx pgx.Tx) error {
		if err := setLockTimeout(ctx, tx, swapLock); err != nil {
			return err
		}
		old, until, err := r.livePositions(ctx, tx, "FOR UPDATE OF t")
		if err != nil {
			return err
		}
		r.leaveOut(until)
		catching, cancel := context.WithTimeoutCause(ctx, swapCatchUp, errTooSlow)
		defer cancel()
		if err := r.advance(catching, until); err != nil {
			if catching.Err() != nil && ctx.Err() == nil {
				// A task that was stopped in the middle of a transaction does not know where it is.
				if err := r.load(ctx); err != nil {
					return err
				}
				return errTooSlow
			}
			return err
		}
		return f(tx, old)
	})
}

// swap makes the build the live one. The tasks of the old one lose nothing: the new build's go on from its own positions.
func (r *replay) swap(ctx context.Context) error {
	err := r.meet(ctx, func(tx pgx.Tx, _ build) error { return r.e.publish(ctx, tx, r.model, r.build) })
	if err != nil {
		return fmt.Errorf("swap: %w", err)
	}
	return nil
}

// keepAside leaves the build for people to look at.
func (r *replay) keepAside(ctx context.Context) error {
	_, err := r.conn.Exec(ctx, "UPDATE wharf.builds SET state = $2, keep_until = now() + make_interval(secs => $3) WHERE id = $1",
		r.build.id, scratch, r.e.Keep.Seconds())
	return err
}

// livePositions says where the live build's tasks are, in the new build's order of topics; -1 for a topic that it does
// not listen to. That it has been in another topic, or nowhere, is an error unless what there is will do.
func (r *replay) livePositions(ctx context.Context, tx querier, lock string) (old build, until [][]int64, err error) {
	until = make([][]int64, r.e.Partitions)
	for p := range until {
		until[p] = slices.Repeat([]int64{-1}, len(r.model.Topics))
	}
	old, found, err := buildIn(ctx, tx, role{r.model.Name, live})
	if err != nil {
		return old, nil, err
	}
	if !found {
		return old, nil, errors.New("there is no live build: run a projector first")
	}
	if old.partitions != r.e.Partitions {
		return old, nil, fmt.Errorf("the live build was made from %d partitions, and there are %d", old.partitions, r.e.Partitions)
	}
	if err := r.e.ofThisLog(old); err != nil && !r.lost {
		return old, nil, err
	}
	rows, err := tx.Query(ctx, `SELECT t.partition, b.topics, t.offsets
		FROM wharf.tasks t JOIN wharf.builds b ON b.id = t.build
		WHERE b.id = $1 AND b.state = 'live' ORDER BY t.partition `+lock, old.id)
	if err != nil {
		return old, nil, err
	}
	var partition int32
	var topics []string
	var offsets []int64
	tag, err := pgx.ForEachRow(rows, []any{&partition, &topics, &offsets}, func() error {
		for i, topic := range topics {
			if j := slices.Index(r.model.Topics, topic); j >= 0 && !old.isOther(i, r.e.TopicIDs) {
				until[partition][j] = offsets[i]
			}
		}
		return nil
	})
	if err == nil && tag.RowsAffected() == 0 {
		now, found, err := buildIn(ctx, tx, role{r.model.Name, live})
		if err != nil {
			return old, nil, err
		}
		if found && now.id != old.id { // swapped in between
			return r.livePositions(ctx, tx, lock)
		}
	}
	if err == nil && tag.RowsAffected() < int64(r.e.Partitions) && !r.lost && !r.upgrade {
		err = fmt.Errorf("the live build has only %d rows in wharf.tasks for %d partitions: somebody has deleted the others; build it anew "+
			"(wharf replay --force)", tag.RowsAffected(), r.e.Partitions)
	}
	return old, until, err
}

// abandon drops the unfinished build. If it cannot, the next sweep does.
func (r *replay) abandon(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpWithin)
	defer cancel()
	return pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error { return drop(ctx, tx, r.build, "state = 'building'") })
}

// moved tells of records that were read, and holds the reader back if it has a pace.
func (r *replay) moved(ctx context.Context, records int64) {
	r.mu.Lock()
	r.report.Done += records
	r.report.Total = max(r.report.Total, r.report.Done)
	r.progress(r.report)
	wait := r.pace.wait(records)
	r.mu.Unlock()
	if wait > 0 {
		pause(ctx, wait)
	}
}

// through tells that a partition was read to where its end was.
func (r *replay) through() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.report.Phase == PhaseReading {
		r.report.PartitionsDone++
		r.progress(r.report)
	}
}

func (r *replay) tell(p Phase) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Phase = p
	r.progress(r.report)
}
