package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

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
	Lost     time.Duration       // how long the database may not answer until others get the tasks; 6 seconds. A task's transaction has ten times as long
	Logger   *slog.Logger
}

// Share calls owned for every partition number that this process gets of the group's, in a goroutine of its own, until another
// process has to get it: then ctx of that call ends. It returns when ctx ends and every owned has returned.
type Share func(ctx context.Context, group string, topics []string, owned func(ctx context.Context, partition int32)) error

// group is the name of the group that shares the tasks of a read model out. Programs of another version have another one: they
// cannot run these tasks, and would hold partitions during a rolling update that nobody runs then. So have those of another database,
// whose tasks are others: a copy to try something with, or the one to move to.
func (e *Engine) group(ctx context.Context, m projections.Model) (string, error) {
	ctx, cancel := e.inTime(ctx)
	defer cancel()
	var database string
	err := e.pool.QueryRow(ctx, `SELECT left(encode(sha256((system_identifier || '/' || oid)::bytea), 'hex'), 8)
		FROM pg_control_system(), pg_database WHERE datname = current_database()`).Scan(&database)
	if err != nil {
		return "", fmt.Errorf("ask the database which one it is: %w", err)
	}
	return fmt.Sprintf("projector.%s.v%d.%s", m.Name, m.Version, database), nil
}

// Engine runs read models on a database. Several, in any number of processes, share the work: each read model in each
// partition number is a task, which runs where its group says. Should two run the same task, all but one find
// that its position has moved, and write nothing. Setup, then Run.
type Engine struct {
	Config
	pool  *pgxpool.Pool
	bulk  limits          // of tasks that fill a build
	turns map[role]*turns // of each build's tasks

	mu      sync.Mutex
	kept    map[role]*keptBuild
	runs    map[string]int       // how many partitions of each read model its group has given to this process
	reach   context.Context      // ends when the database has not answered for Lost; nil until it has answered once
	lose    context.CancelFunc   // ends it
	changed chan struct{}        // closed, and made anew, when kept, runs or reach changes
	unnamed error                // why the groups cannot be named
	warned  map[string]time.Time // when somebody was last told of it, by what they were told of
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
	if c.Lost == 0 {
		c.Lost = 6 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	e := &Engine{Config: c, pool: pool, bulk: bulkLimits, turns: map[role]*turns{}, kept: map[role]*keptBuild{},
		runs: map[string]int{}, changed: make(chan struct{}), warned: map[string]time.Time{}}
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
			return fmt.Errorf("the read models were built from %d partitions, and %d were asked for (--partitions): topics cannot "+
				"grow", b.partitions, e.Partitions)
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
				if old.version > m.Version {
					e.Logger.Warn("the table of a read model is gone, and a newer program's to be built anew", "model", m.Name, "build", old.id, "version", old.version)
					return nil
				}
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
	b, found, err := buildIn(ctx, tx, role{m.Name, previous})
	if err != nil || !found || b.version != m.Version {
		return b, false, err
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

// Run runs the tasks that share gives this process, on the live and the previous builds, until ctx ends. It watches out for builds
// that were swapped in, drops old ones, and builds anew the read models whose definition has a higher version than the live build.
// Postgres or Kafka being away is waited for; who does not reach Postgres lets others have its tasks. It returns nil, or what share
// returns.
//
// A task that meets an error which only people can mend (a gap in a topic) halts: it says so in the log and in wharf_read.builds,
// and goes on when its build is swapped or it is started anew; the others are not held up.
func (e *Engine) Run(ctx context.Context, share Share) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { e.watch(ctx); return nil })
	group.Go(func() error { e.sweepNowAndThen(ctx); return nil })
	group.Go(func() error { e.verifyNowAndThen(ctx); return nil })
	for _, m := range e.Models {
		group.Go(func() error { e.upgrade(ctx, m); return nil })
		group.Go(func() error {
			for {
				reaching := e.reaching(ctx)
				if reaching == nil {
					return nil
				}
				if err := e.takePart(reaching, m, share); err != nil {
					return err
				}
			}
		})
	}
	return group.Wait()
}

// takePart runs the tasks of the read model that its group gives to this process, until ctx ends.
func (e *Engine) takePart(ctx context.Context, m projections.Model, share Share) error {
	name, err := e.group(ctx, m)
	e.mu.Lock()
	e.unnamed = err
	e.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil && e.mayWarn("groups") {
			e.Logger.Warn("the groups of the read models cannot be named, and it is tried again", "err", err)
		}
		pause(ctx, time.Second)
		return nil
	}
	count := func(n int) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.runs[m.Name] += n
		e.tellChanged()
	}
	return share(ctx, name, m.Topics, func(ctx context.Context, partition int32) {
		count(1)
		defer count(-1)
		var wg sync.WaitGroup
		for _, state := range []string{live, previous} {
			wg.Go(func() { e.runTask(ctx, m, partition, state) })
		}
		wg.Wait()
	})
}

// tellChanged wakes who waits for a change, under e.mu.
func (e *Engine) tellChanged() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// reaching waits until the database answers, and is for as long as it does; nil when ctx ends.
func (e *Engine) reaching(ctx context.Context) context.Context {
	for ctx.Err() == nil {
		e.mu.Lock()
		reach, changed := e.reach, e.changed
		e.mu.Unlock()
		if reach != nil && reach.Err() == nil {
			return reach
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	return nil
}

// Ready is nil when Run reaches the database and may take part in its groups, and every live build is of this program's version
// or a newer one. Until then a program of the older version must not be stopped: it alone can run the live build.
func (e *Engine) Ready() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.reach == nil || e.reach.Err() != nil {
		return errors.New("the projector does not reach a database that it can write to")
	}
	if e.unnamed != nil {
		return e.unnamed
	}
	for _, m := range e.Models {
		if b := e.kept[role{m.Name, live}]; b != nil && b.version < m.Version {
			return fmt.Errorf("the read model %s is to be built anew: until then only a projector of its version %d keeps it up to date",
				m.Name, b.version)
		}
	}
	return nil
}

// reached notes that the database has answered, in ctx of Run.
func (e *Engine) reached(ctx context.Context) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.reach != nil && e.reach.Err() == nil {
		return
	}
	if e.reach != nil {
		e.Logger.Info("the database answers again")
	}
	e.reach, e.lose = context.WithCancel(ctx)
	e.tellChanged()
}

// lost notes that the database has not answered for too long.
func (e *Engine) lost(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.reach != nil && e.reach.Err() == nil {
		e.Logger.Warn("the database could not be used for a while: others may run the tasks of this projector", "err", err)
		e.lose()
	}
	e.pool.Reset() // new connections may lead to a new primary
}

// watch looks which builds there are.
func (e *Engine) watch(ctx context.Context) {
	since := time.Now() // when it answered, or was given up
	for trouble := 0; ; {
		err := e.look(ctx)
		if trouble++; err == nil {
			trouble, since = 0, time.Now()
			e.reached(ctx)
		} else if ctx.Err() == nil {
			if trouble == 4 {
				e.Logger.Warn("the projector cannot see which builds are live, and tries again", "err", err)
			}
			if time.Since(since) > e.Lost {
				since = time.Now()
				e.lost(err)
			}
		}
		if !pause(ctx, e.Poll) {
			e.forget()
			return
		}
	}
}

// sweepNowAndThen sweeps what is not needed any more. Who reads an old build may hold that up for a while, and nothing else.
func (e *Engine) sweepNowAndThen(ctx context.Context) {
	for pause(ctx, max(e.Grace/4, 10*time.Millisecond)) {
		sweeping, cancel := e.inTime(ctx)
		err := e.sweep(sweeping)
		cancel()
		if err != nil && ctx.Err() == nil {
			e.Logger.Warn("old builds cannot be dropped, and are tried again", "err", err)
		}
	}
}

// inTime bounds what takes a moment: over a connection that leads to nowhere, and says nothing, it would take for ever.
func (e *Engine) inTime(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, 10*e.Lost)
}

// look finds out which builds are to be kept up to date.
func (e *Engine) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, max(e.Lost/3, 100*time.Millisecond)) // a connection that leads to nowhere is not all of them
	defer cancel()
	if err := writable(ctx, e.pool); err != nil {
		return err
	}
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
		e.tellChanged()
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

// runTask runs a task on whatever build has the role, until ctx ends.
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
			e.awaitRepair(whileKept, b.build, partition, t.epoch, err)
		default:
			if t.took > 0 { // it has stored something
				retry = backoff{}
			}
			if (retry.tries == 3 || retry.tries%30 == 29) && !isCode(err, codeMoved) && e.mayWarn(m.Name) {
				log.Warn("a projection fails, and is tried again from its stored position", "build", b.id, "err", err)
			}
			if !isCode(err, codeMoved) {
				e.tellTrouble(whileKept, b.build, partition, err)
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

// tellTrouble shows everybody why the task is tried again, as well as it goes: what is wrong may be the database.
func (e *Engine) tellTrouble(ctx context.Context, b build, partition int32, trouble error) {
	ctx, cancel := e.inTime(ctx)
	defer cancel()
	_, _ = e.pool.Exec(ctx, "UPDATE wharf.tasks SET trouble = $3 WHERE "+unlockedTask,
		b.id, partition, fmt.Sprintf("%s: %v", time.Now().UTC().Format(time.RFC3339), trouble))
}

// unlockedTask is for what is only told of a task: it is left out while somebody holds the task's row, who may do so for long. Waiting
// for that would take the connections that others need.
const unlockedTask = `(build, partition) IN (SELECT build, partition FROM wharf.tasks WHERE build = $1 AND partition = $2
	FOR NO KEY UPDATE SKIP LOCKED)`

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
	clearing, cancel := e.inTime(ctx)
	defer cancel()
	if _, err := e.pool.Exec(clearing, "UPDATE wharf.tasks SET error = '' WHERE build = $1 AND partition = $2 AND error <> ''",
		b.id, partition); err != nil {
		return t, err
	}
	t.turns = e.turns[role{m.Name, b.state}]
	defer t.showParked()()
	return t, t.run(ctx, nil)
}

// awaitRepair shows everybody why the task is halted, and returns when somebody has repaired it since the epoch, or ctx ends.
func (e *Engine) awaitRepair(ctx context.Context, b build, partition int32, epoch int64, halt error) {
	for !e.repaired(ctx, b, partition, epoch, halt) && pause(ctx, 4*e.Poll) {
	}
}

func (e *Engine) repaired(ctx context.Context, b build, partition int32, epoch int64, halt error) bool {
	ctx, cancel := e.inTime(ctx)
	defer cancel()
	var now int64
	var shown string
	row := e.pool.QueryRow(ctx, "SELECT epoch, error FROM wharf.tasks WHERE build = $1 AND partition = $2", b.id, partition)
	switch err := row.Scan(&now, &shown); {
	case err != nil:
		return false
	case now != epoch:
		return true
	case shown != legible(halt.Error()) && !errors.Is(halt, errOtherLog): // or whoever ran the task before, and still did for a moment, has cleared it
		_, _ = e.pool.Exec(ctx, "UPDATE wharf.tasks SET error = $4 WHERE epoch = $3 AND "+unlockedTask,
			b.id, partition, epoch, legible(halt.Error())) // or else the next time round
	}
	return false
}

// upgrade builds the read model anew whenever its definition has a higher version than the live build. A lower one is left alone:
// it means that a newer program is at work.
func (e *Engine) upgrade(ctx context.Context, m projections.Model) {
	leftAlone := int64(0) // a build that somebody was told of
	for retry := (backoff{}); ; {
		e.mu.Lock()
		b, runs, changed := e.kept[role{m.Name, live}], e.runs[m.Name], e.changed
		e.mu.Unlock()
		// A new version's group is empty at first, and Kafka gives its partitions to nobody for a while: a build would be swapped in
		// that nobody runs.
		if b == nil || b.version >= m.Version || runs == 0 {
			if b != nil && b.version > m.Version && b.id != leftAlone {
				leftAlone = b.id
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
		err := e.ofThisLog(b.build)
		if err == nil {
			e.Logger.Info("building a read model anew", "model", m.Name, "from", b.version, "to", m.Version)
			// The rows differ on purpose: how is said in the log.
			err = e.replay(ctx, m, ReplayOptions{Force: true, upgrade: true}, func(p Progress) {
				if p.Phase == PhaseSwapping && p.Comparison != nil && !p.Comparison.Same() {
					e.Logger.Info("the new build of a read model differs from the live one", "model", m.Name,
						"difference", p.Comparison.String())
				}
			})
		}
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
}
