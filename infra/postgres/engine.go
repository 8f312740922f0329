package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/semaphore"

	"wharf/infra/journal"
	"wharf/projections"
)

// Source gives the reader of a public topic.
type Source func(topic string) journal.Reader

// Config is what an Engine needs. The zero value of a field below "Optional" means its default.
type Config struct {
	Source     Source
	Partitions int // of every topic

	// Optional.
	TopicIDs map[string]string   // of the topics that there are: a build that was made of others does not go on
	Models   []projections.Model // projections.All
	Interval time.Duration       // how long a position that changed no rows waits to be stored at most; 1 second
	Batch    int                 // most events in one transaction; 5,000
	Copy     int                 // as many new rows are written by COPY in live projection, which takes more round trips than INSERT and less time; 100
	Parallel int                 // partitions of a build that are filled at once; one less than there are processors, which queries need
	Grace    time.Duration       // how long a build that is not needed any more is kept for the queries on it; 1 minute
	Keep     time.Duration       // how long the previous build is kept up to date, for a rollback; 1 hour
	Verify   time.Duration       // between two verifications of all read models in the background; 0 for none
	Pace     int                 // events a second that these read at most; 20,000
	Park     int                 // events of one task that may be parked; with more it halts; 10,000
	Poll     time.Duration       // between looks for builds that others have swapped in; 250 ms
	Logger   *slog.Logger
}

// Engine runs read models on a database. Several, in any number of processes, share the work: each read model in each
// partition number is a task, which runs where RunPartition runs it. Should two run the same task, all but one find
// that its position has moved, and write nothing.
//
//	Setup, then Run in a goroutine of its own, and RunPartition for each partition number that this process owns.
type Engine struct {
	Config
	pool  *pgxpool.Pool
	bulk  limits          // of tasks that fill a build
	turns map[role]*turns // of each build's tasks

	helping *semaphore.Weighted // of those who bring others' tasks on

	mu      sync.Mutex
	kept    map[role]*keptBuild
	changed chan struct{}        // closed, and made anew, when kept changes
	warned  map[string]time.Time // when somebody was last told of it, by what they were told of
	mine    map[int32]int        // the partitions that run here; for a moment, one may run twice
}

// role is what a build that is kept up to date is for: the model's live build, or its previous one.
type role struct{ model, state string }

// keptBuild is a build for as long as it has its role; then ctx ends.
type keptBuild struct {
	build
	ctx    context.Context
	retire context.CancelFunc
}

// New makes an engine on the pool, which Open has opened.
func New(pool *pgxpool.Pool, c Config) *Engine {
	if c.Models == nil {
		c.Models = projections.All
	}
	if c.Interval == 0 {
		c.Interval = time.Second
	}
	if c.Batch == 0 {
		c.Batch = 5000
	}
	if c.Copy == 0 {
		c.Copy = copiedRows
	}
	if c.Parallel == 0 {
		c.Parallel = max(1, runtime.GOMAXPROCS(0)-1)
	}
	if c.Grace == 0 {
		c.Grace = time.Minute
	}
	if c.Keep == 0 {
		c.Keep = time.Hour
	}
	if c.Park == 0 {
		c.Park = 10_000
	}
	if c.Pace == 0 {
		c.Pace = 20_000
	}
	if c.Poll == 0 {
		c.Poll = 250 * time.Millisecond
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	e := &Engine{Config: c, pool: pool, bulk: bulkLimits, turns: map[role]*turns{}, kept: map[role]*keptBuild{},
		helping: semaphore.NewWeighted(helpers), changed: make(chan struct{}), warned: map[string]time.Time{}, mine: map[int32]int{}}
	for _, m := range c.Models {
		e.turns[role{m.Name, live}], e.turns[role{m.Name, previous}] = newTurns(liveWriters), newTurns(previousWriters)
	}
	return e
}

// oldest is the oldest Postgres that will do, as server_version_num counts.
const oldest = 15_00_00

// Answers says whether the database does, within two seconds.
func (e *Engine) Answers(ctx context.Context) bool {
	ctx, enough := context.WithTimeout(ctx, 2*time.Second)
	defer enough()
	return e.pool.Ping(ctx) == nil
}

// Check says what is wrong with the database for an operation on read models that are there: it is too old, read-only, or
// no projector has set it up yet.
func (e *Engine) Check(ctx context.Context) error {
	if err := writable(ctx, e.pool); err != nil {
		return err
	}
	var there bool
	if err := e.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_attribute
		WHERE attrelid = to_regclass('wharf.builds') AND attname = 'topic_ids')`).Scan(&there); err != nil {
		return fmt.Errorf("look at the database: %w", err)
	}
	if !there {
		return errors.New("the database holds no read models of this version of Wharf: start a projector first")
	}
	return nil
}

// Partitions is how many partitions the read models of the database were built from.
func Partitions(ctx context.Context, pool *pgxpool.Pool) (int, error) {
	var partitions *int
	if err := pool.QueryRow(ctx, "SELECT max(partitions) FROM wharf.builds WHERE state = 'live'").Scan(&partitions); err != nil {
		return 0, fmt.Errorf("look at the database: %w", err)
	}
	if partitions == nil {
		return 0, errors.New("the database holds no read models: start a projector first")
	}
	return *partitions, nil
}

// writable says what is wrong with the database, if it cannot hold read models.
func writable(ctx context.Context, db projections.DB) error {
	var version int
	var readOnly bool
	err := db.QueryRow(ctx, `SELECT current_setting('server_version_num')::int,
		pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool`).Scan(&version, &readOnly)
	switch {
	case err != nil:
		return fmt.Errorf("look at the database: %w", err)
	case version < oldest:
		return fmt.Errorf("the database is Postgres %d, and 15 or newer is needed: upgrade it", version/10_000)
	case readOnly:
		return errors.New("the database is read-only (a standby?): use the primary")
	}
	return nil
}

// Setup makes the engine's tables, the role of the query service, and a first, empty build of every read model that has
// none: it is live at once, so that queries can be answered. It may be called at any time, by several at once.
func (e *Engine) Setup(ctx context.Context) error {
	conn, err := e.pool.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("set up the read models: %w", err)
	}
	defer conn.Release()
	if err := e.setup(ctx, conn); err != nil {
		return fmt.Errorf("set up the read models: %w", err)
	}
	return nil
}

func (e *Engine) setup(ctx context.Context, conn *pgxpool.Conn) error {
	if err := writable(ctx, conn); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "SELECT pg_advisory_lock($1, $2)", lockClass, setupLock); err != nil {
		return err
	}
	defer unlock(ctx, conn, lockClass, setupLock)
	if err := e.migrate(ctx); err != nil {
		return err
	}
	have, err := builds(ctx, conn, live)
	if err != nil {
		return err
	}
	for _, b := range have {
		if b.partitions != e.Partitions {
			return fmt.Errorf("the read models were built from %d partitions, and there are %d: growing topics is not "+
				"supported", b.partitions, e.Partitions)
		}
	}
	for _, m := range e.Models {
		if len(e.TopicIDs) > 0 { // what was made by a program that did not ask for them
			_, err := conn.Exec(ctx, "UPDATE wharf.builds SET topic_ids = $2 WHERE model = $1 AND topics = $3 AND topic_ids = '{}'",
				m.Name, e.idsOf(m.Topics), m.Topics)
			if err != nil {
				return err
			}
			_, err = conn.Exec(ctx, `UPDATE wharf.discarded d SET topic_id = t.id FROM unnest($2::text[], $3::text[]) AS t (topic, id)
				WHERE d.model = $1 AND d.topic = t.topic AND d.topic_id = '' AND t.id <> ''`, m.Name, m.Topics, e.idsOf(m.Topics))
			if err != nil {
				return err
			}
		}
		old, found := of(have, m.Name)
		if found {
			there, err := old.hasTable(ctx, conn)
			if err == nil && there {
				err = e.repoint(ctx, conn, m, old)
			}
			if err != nil {
				return fmt.Errorf("make the view of %s anew: %w", m.Name, err)
			}
			if there {
				continue
			}
		}
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if found { // somebody has dropped its table
				tag, err := tx.Exec(ctx, "UPDATE wharf.builds SET state = 'retired', keep_until = now() WHERE id = $1 AND state = 'live'", old.id)
				if err != nil || tag.RowsAffected() == 0 { // a replay was quicker
					return err
				}
				back, whole, err := e.previousOf(ctx, tx, m)
				if err != nil {
					return err
				}
				if whole {
					e.Logger.Warn("the table of a read model is gone, and the previous build is the live one again", "model", m.Name, "build", old.id)
					return e.publish(ctx, tx, m, back)
				}
				e.Logger.Warn("the table of a read model is gone, and is built anew from the log", "model", m.Name, "build", old.id)
			}
			b, err := e.create(ctx, tx, m, forReplay)
			if err == nil {
				err = finish(ctx, tx, m, b)
			}
			if err == nil {
				err = e.publish(ctx, tx, m, b)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("make the first build of %s: %w", m.Name, err)
		}
	}
	return nil
}

// previousOf is the model's previous build, if it is whole and of this program's version.
func (e *Engine) previousOf(ctx context.Context, tx pgx.Tx, m projections.Model) (b build, whole bool, err error) {
	all, err := builds(ctx, tx, previous)
	if err != nil {
		return b, false, err
	}
	b, found := of(all, m.Name)
	if !found || b.version != m.Version {
		return b, false, nil
	}
	wrong, err := e.whatIsWrong(ctx, tx, b)
	return b, wrong == nil, err
}

// whatIsWrong says why queries should not read the build, if so, other than that it has halted: a start tries that again.
func (e *Engine) whatIsWrong(ctx context.Context, db querier, b build) (wrong, err error) {
	there, err := b.hasTable(ctx, db)
	if err != nil {
		return nil, err
	}
	tag, err := db.Exec(ctx, "SELECT FROM wharf.tasks WHERE build = $1", b.id)
	switch tasks := tag.RowsAffected(); {
	case err != nil:
		return nil, err
	case !there:
		return fmt.Errorf("the table of build %d is gone", b.id), nil
	case tasks < int64(b.partitions):
		return fmt.Errorf("build %d has only %d rows in wharf.tasks for %d partitions", b.id, tasks, b.partitions), nil
	}
	return e.ofThisLog(b), nil
}

// unlock gives a session's advisory lock back, even when ctx has ended; a connection that cannot is closed, which does.
func unlock(ctx context.Context, conn *pgxpool.Conn, class, object int32) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectTimeout)
	defer cancel()
	if _, err := conn.Exec(ctx, "SELECT pg_advisory_unlock($1, $2)", class, object); err != nil {
		_ = conn.Conn().Close(ctx)
	}
}

// Run does until ctx ends what is not of one partition: it watches out for builds that were swapped in (which all tasks
// of this engine wait for: without Run none of them runs), drops old ones, and builds anew the read models whose
// definition has a higher version than the live build, and helps out while programs of two versions share the partitions.
// It returns nil.
func (e *Engine) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { e.upgrade(ctx) })
	wg.Go(func() { e.verifyNowAndThen(ctx) })
	wg.Go(func() { e.help(ctx) })
	sweeping := time.NewTicker(max(e.Grace/4, 10*time.Millisecond))
	defer sweeping.Stop()
	polling := time.NewTicker(e.Poll)
	defer polling.Stop()
	for trouble := 0; ; {
		err := e.look(ctx)
		if trouble++; err == nil {
			trouble = 0
		} else if trouble == 4 && ctx.Err() == nil {
			e.Logger.Warn("the projector cannot see which builds are live, and tries again", "err", err)
		}
		select {
		case <-ctx.Done():
			e.forget()
			return nil
		case <-polling.C:
		case <-sweeping.C:
			if err := e.sweep(ctx); err != nil && ctx.Err() == nil {
				e.Logger.Warn("old builds cannot be dropped, and are tried again", "err", err)
			}
		}
	}
}

// look finds out which builds are to be kept up to date.
func (e *Engine) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	now, err := builds(ctx, e.pool, live, previous)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	gone := maps.Clone(e.kept)
	changed := false
	for _, b := range now {
		if b.state == live {
			b.showVerified()
		}
		as := role{b.model, b.state}
		old := e.kept[as]
		delete(gone, as)
		if old != nil && old.id == b.id {
			continue
		}
		changed = true
		if old != nil {
			old.retire()
		}
		fresh := &keptBuild{build: b}
		fresh.ctx, fresh.retire = context.WithCancel(context.Background())
		e.kept[as] = fresh
	}
	for as, b := range gone { // a previous one that was dropped
		b.retire()
		delete(e.kept, as)
	}
	if changed {
		close(e.changed)
		e.changed = make(chan struct{})
	}
	return nil
}

// forget ends what waits for builds to retire.
func (e *Engine) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, b := range e.kept {
		b.retire()
	}
	e.kept = map[role]*keptBuild{}
}

// current waits for the build in that role, in our version of the model; nil when ctx ends.
func (e *Engine) current(ctx context.Context, m projections.Model, state string) *keptBuild {
	for {
		e.mu.Lock()
		b, changed := e.kept[role{m.Name, state}], e.changed
		e.mu.Unlock()
		if b != nil && b.version == m.Version {
			return b
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// RunPartition runs the tasks of all read models in the partition number, on the live and the previous builds, until ctx
// ends; then it returns nil. Postgres or Kafka being away is waited for. A task that meets an error which only people can mend (a gap
// in a topic) halts: it says so in the log and in wharf_read.builds, and goes on when its build is swapped or it is
// started anew; the others are not held up.
func (e *Engine) RunPartition(ctx context.Context, partition int32) error {
	if partition < 0 || int(partition) >= e.Partitions {
		return fmt.Errorf("there is no partition %d of %d", partition, e.Partitions)
	}
	count := func(n int) { e.mu.Lock(); e.mine[partition] += n; e.mu.Unlock() }
	count(1)
	defer count(-1)
	var wg sync.WaitGroup
	for _, m := range e.Models {
		for _, state := range []string{live, previous} {
			wg.Go(func() { e.runTask(ctx, m, partition, state) })
		}
	}
	wg.Wait()
	return nil
}

func (e *Engine) runTask(ctx context.Context, m projections.Model, partition int32, state string) {
	log := e.Logger.With("model", m.Name, "partition", partition)
	retry := backoff{}
	for ctx.Err() == nil {
		b := e.current(ctx, m, state)
		if b == nil {
			return
		}
		whileKept, cancel := context.WithCancel(ctx)
		stop := context.AfterFunc(b.ctx, cancel)
		t, err := e.follow(whileKept, m, b.build, partition)
		var halt *haltError
		switch {
		case whileKept.Err() != nil: // swapped, or the end
			retry = backoff{}
		case errors.As(err, &halt):
			if !errors.Is(err, errOtherLog) || e.mayWarn(fmt.Sprint("another log, build ", b.id)) { // which all tasks are told
				log.Error("a projection halts: it does not go on without help", "build", b.id, "err", err)
			}
			e.awaitRepair(whileKept, b.build, partition, t.epoch, err, log)
		default:
			if t.took > 0 { // it has stored something
				retry = backoff{}
			}
			if (retry.tries == 3 || retry.tries%30 == 29) && !isCode(err, codeMoved) && e.mayWarn(m.Name) {
				log.Warn("a projection fails, and is tried again from its stored position", "build", b.id, "err", err)
			}
			if !isCode(err, codeMoved) {
				// As well as it goes: what is wrong may be the database.
				_, _ = e.pool.Exec(whileKept, "UPDATE wharf.tasks SET trouble = $3 WHERE build = $1 AND partition = $2",
					b.id, partition, fmt.Sprintf("%s: %v", time.Now().UTC().Format(time.RFC3339), err))
			}
			retry.sleep(whileKept)
			if isCode(err, codeMoved) {
				_ = e.look(whileKept) // was it a swap? If this fails, Run looks soon
			}
		}
		stop()
		cancel()
	}
}

// mayWarn is true once in a while: when the database is away all tasks of a model fail, and one that says so will do. What each of
// them met is in wharf.tasks.
func (e *Engine) mayWarn(of string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	may := time.Since(e.warned[of]) > time.Second
	if may {
		e.warned[of] = time.Now()
	}
	return may
}

// follow runs one task on the build from its stored position on. It returns the task as it ended, whatever the error.
func (e *Engine) follow(ctx context.Context, m projections.Model, b build, partition int32) (*task, error) {
	t, err := e.load(ctx, e.pool, m, b, partition)
	if err != nil {
		return t, err
	}
	// If it was halted, it tries once more, and says so again if that does not help.
	if _, err := e.pool.Exec(ctx, "UPDATE wharf.tasks SET error = '' WHERE build = $1 AND partition = $2 AND error <> ''",
		b.id, partition); err != nil {
		return t, err
	}
	t.turns = e.turns[role{m.Name, b.state}]
	defer t.showParked()()
	return t, t.run(ctx, nil)
}

// awaitRepair shows everybody why the task is halted, and returns when somebody has repaired it since the epoch, or ctx ends.
func (e *Engine) awaitRepair(ctx context.Context, b build, partition int32, epoch int64, halt error, log *slog.Logger) {
	for {
		var now int64
		var shown string
		row := e.pool.QueryRow(ctx, "SELECT epoch, error FROM wharf.tasks WHERE build = $1 AND partition = $2", b.id, partition)
		switch err := row.Scan(&now, &shown); {
		case err != nil:
		case now != epoch:
			return
		case shown != legible(halt.Error()) && !errors.Is(halt, errOtherLog): // or whoever ran the task before, and still did for a moment, has cleared it
			e.recordHalt(ctx, b, partition, halt, log)
		}
		if !pause(ctx, 4*e.Poll) {
			return
		}
	}
}

// recordHalt writes down why the task is halted, so that everybody can see it.
func (e *Engine) recordHalt(ctx context.Context, b build, partition int32, halt error, log *slog.Logger) {
	for retry := (backoff{}); ; {
		_, err := e.pool.Exec(ctx, "UPDATE wharf.tasks SET error = $3 WHERE build = $1 AND partition = $2",
			b.id, partition, legible(halt.Error()))
		if err == nil || !retry.sleep(ctx) {
			return
		}
		log.Debug("a halt cannot be written down, and is tried again", "err", err)
	}
}

// upgrade builds anew what is defined in a higher version than the live build's. A lower one is left alone: it means
// that a newer program is at work.
func (e *Engine) upgrade(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, m := range e.Models {
		wg.Go(func() {
			for retry := (backoff{}); ; {
				e.mu.Lock()
				b, changed := e.kept[role{m.Name, live}], e.changed
				e.mu.Unlock()
				if b == nil || b.version >= m.Version {
					if b != nil && b.version > m.Version {
						e.Logger.Warn("the live build is of a newer definition, and is left alone",
							"model", m.Name, "live", b.version, "ours", m.Version)
					}
					retry = backoff{}
					select {
					case <-changed:
						continue
					case <-ctx.Done():
						return
					}
				}
				e.Logger.Info("building a read model anew", "model", m.Name, "from", b.version, "to", m.Version)
				// The rows differ on purpose: how is said in the log.
				err := e.replay(ctx, m, ReplayOptions{Force: true, upgrade: true}, func(p Progress) {
					if p.Phase == PhaseSwapping && p.Comparison != nil && !p.Comparison.Same() {
						e.Logger.Info("the new build of a read model differs from the live one", "model", m.Name,
							"difference", p.Comparison.String())
					}
				})
				if errors.Is(err, errUpgraded) { // another projector was quicker
					err = nil
				}
				if err != nil && !errors.Is(err, ErrReplaying) && ctx.Err() == nil {
					e.Logger.Error("building a read model anew failed, and is tried again", "model", m.Name, "err", err)
				}
				// Also after an error: the answer to a swap may have been lost.
				if err = errors.Join(err, e.look(ctx)); err != nil && !retry.sleep(ctx) {
					return
				}
			}
		})
	}
}

// help keeps the live builds up to date while a rolling update is under way: some partitions belong to programs of another
// version then, who cannot run these tasks. A task that does not move although there is more to read is brought on from
// here; should its owner be able to run it after all, one of the two finds that its position has moved.
func (e *Engine) help(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, m := range e.Models {
		wg.Go(func() {
			var seen map[int32]standing // by partition
			var of int64
			for pause(ctx, helpEvery*e.Poll) {
				e.mu.Lock()
				b := e.kept[role{m.Name, live}]
				e.mu.Unlock()
				if b == nil || b.version != m.Version {
					continue
				}
				if b.id != of {
					seen, of = nil, b.id
				}
				others, patience, err := e.othersTasks(ctx, b.build, seen)
				if seen = others; err == nil {
					err = e.bring(b.ctx, ctx, m, b.build, others, patience)
				}
				if err != nil && ctx.Err() == nil && b.ctx.Err() == nil {
					e.Logger.Debug("cannot help with a read model", "model", m.Name, "err", err)
				}
			}
		})
	}
}

// How often others are looked at, and how long a task may stand still until it is helped: while there is a build of another
// version, which says that programs of two share the partitions, and else, when it may only be slow. In Config.Poll. What it costs is
// a question to every leader twice a second for each read model, where other projectors are.
const (
	helpEvery         = 2
	patienceAtTwo     = 2
	patienceOtherwise = 10
)

// endTimeout is how long the end of a topic is waited for, helpers how many tasks of others are run at a time, and helpFor how long
// each.
const (
	endTimeout = 500 * time.Millisecond
	helpers    = 2
	helpFor    = 5 * time.Second
)

// standing is a task that stands still.
type standing struct {
	offsets []int64
	ends    []int64 // of its topics, when it was first seen there
	since   time.Time
}

// othersTasks is where the tasks of others on the build stand, and how long they may. One that has moved, or that had nothing to
// read, is seen for the first time.
func (e *Engine) othersTasks(ctx context.Context, b build, before map[int32]standing) (
	others map[int32]standing, patience time.Duration, err error,
) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	rows, err := e.pool.Query(ctx, `SELECT partition, offsets, EXISTS (SELECT FROM wharf.builds
			WHERE model = $2 AND version <> $3 AND state IN ('building', 'previous'))
		FROM wharf.tasks WHERE build = $1 AND error = ''`, b.id, b.model, b.version)
	if err != nil {
		return nil, 0, err
	}
	others = map[int32]standing{}
	patience = patienceOtherwise * e.Poll
	var p int32
	var offsets []int64
	var two bool
	_, err = pgx.ForEachRow(rows, []any{&p, &offsets, &two}, func() error {
		if two {
			patience = patienceAtTwo * e.Poll
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.mine[p] > 0 {
			return nil
		}
		others[p] = before[p]
		if at := (position{offsets: offsets}); !slices.Equal(before[p].offsets, offsets) || at.passed(before[p].ends) {
			others[p] = standing{slices.Clone(offsets), make([]int64, len(offsets)), time.Time{}} // ends are not known yet
		}
		return nil
	})
	// Who has no leader does not hold up the others for long, and is asked about again.
	ctx, enough := context.WithTimeout(ctx, endTimeout)
	defer enough()
	var asking sync.WaitGroup
	for p, s := range others {
		for i, topic := range b.topics {
			if s.ends[i] <= s.offsets[i] {
				asking.Go(func() {
					if end, err := e.Source(topic).End(ctx, p); err == nil {
						s.ends[i] = end
					}
				})
			}
		}
	}
	asking.Wait()
	for p, s := range others {
		if s.since.IsZero() {
			s.since = time.Now()
			others[p] = s
		}
	}
	return others, patience, err
}

// bring runs the tasks that have stood still for too long to where their topics ended then.
func (e *Engine) bring(
	whileKept, ctx context.Context, m projections.Model, b build, others map[int32]standing, patience time.Duration,
) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(whileKept, cancel)()
	var errs []error
	for p, s := range others {
		if time.Since(s.since) < patience || (position{offsets: s.offsets}).passed(s.ends) {
			continue
		}
		if err := e.helping.Acquire(ctx, 1); err != nil {
			return err
		}
		errs = append(errs, e.bringOne(ctx, m, b, p, s))
		e.helping.Release(1)
	}
	return errors.Join(errs...)
}

// bringOne runs a task if it still stands where it was seen. What it does until there is no more time stays.
func (e *Engine) bringOne(ctx context.Context, m projections.Model, b build, p int32, s standing) error {
	helping, enough := context.WithTimeout(ctx, helpFor)
	defer enough()
	t, err := e.load(helping, e.pool, m, b, p)
	if err != nil || !slices.Equal(t.stored.offsets, s.offsets) {
		return err
	}
	err = t.run(helping, s.ends)
	if halt := new(haltError); errors.As(err, &halt) {
		e.recordHalt(ctx, b, p, err, t.log)
		return nil
	}
	if isCode(err, codeMoved) {
		return nil
	}
	return err
}
