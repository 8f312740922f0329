package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"wharf/infra/journal"
	"wharf/projections"
)

// task is one read model in one partition number, on one build. It has this way of working:
//
//	feeds, one a topic: read, check the order, decode  ─▶  collect a batch until it is the task's turn
//	─▶  fold it into rows in memory  ─▶  flush: the changed rows and the new position in one transaction
//
// Batches make themselves: what arrives while others have their turn is in the next one. After any error the task
// object is thrown away, and a new one begins at the stored position: nothing is lost or doubled, whatever became of
// the transaction.
type task struct {
	e         *Engine
	pool      *pgxpool.Pool
	model     projections.Model
	build     build
	partition int32
	limits    limits
	bulk      bool // fills a build that nobody reads yet: rows stay in memory until there are many
	quiet     bool // parks in silence

	turns *turns // of those that share the model's; nil for an operation, which others may be waiting for

	listens func(projections.Event) bool // to which events; nil for all
	wanted  func(key any) bool           // which rows are stored; nil for all

	stored    position // in the database
	epoch     int64    // of the stored position
	at        position // of what is folded into rows
	rows      rowCache
	parked    parked
	discarded map[place]bool            // events that an operator gave up
	careful   position                  // up to here, events go one by one, to find the one whose rows the table refuses
	tried     position                  // what the last batch went up to
	last      time.Time                 // when the last transaction was begun
	took      time.Duration             // a transaction, lately
	moved     func(events, bytes int64) // told of progress; may be nil
	log       *slog.Logger
}

// position has a place per topic of the build, in its order.
type position struct {
	offsets []int64   // to read next
	seqs    []int64   // of the last event seen
	skipped int64     // records that are left out, since the position before
	seen    time.Time // of the last event, or zero
}

func (p position) clone() position {
	return position{slices.Clone(p.offsets), slices.Clone(p.seqs), p.skipped, p.seen}
}

// haltError is an error that trying again does not help.
type haltError struct{ err error }

func (h *haltError) Error() string { return h.err.Error() }
func (h *haltError) Unwrap() error { return h.err }

func haltf(format string, args ...any) error { return &haltError{fmt.Errorf(format, args...)} }

// load finds where the task is. There is a task, in its epoch, when it can be told why it halts.
func (e *Engine) load(
	ctx context.Context, pool *pgxpool.Pool, m projections.Model, b build, partition int32,
) (*task, error) {
	t := &task{e: e, pool: pool, model: m, build: b, partition: partition,
		limits: limits{e.Batch, batchBytes, cachedRows, e.Copy}, bulk: b.state == building,
		log: e.Logger.With("model", m.Name, "build", b.id, "partition", partition)}
	if err := t.reload(ctx); err != nil {
		return t, fmt.Errorf("find the position of %s in partition %d: %w", m.Name, partition, err)
	}
	if err := e.ofThisLog(b); err != nil {
		return t, &haltError{err}
	}
	if !slices.Equal(m.Topics, b.topics) {
		return t, haltf("the build was made from the topics %v, and version %d of %s is made from %v: "+
			"its version must be raised", b.topics, m.Version, m.Name, m.Topics)
	}
	return t, nil
}

// reload goes back to what is stored.
func (t *task) reload(ctx context.Context) error {
	t.stored = position{seen: time.Unix(0, 0)}
	ctx, cancel := t.e.inTime(ctx)
	defer cancel()
	row := t.pool.QueryRow(ctx, "SELECT offsets, seqs, epoch FROM wharf.tasks WHERE build = $1 AND partition = $2",
		t.build.id, t.partition)
	if err := row.Scan(&t.stored.offsets, &t.stored.seqs, &t.epoch); err != nil {
		return err
	}
	t.at = t.stored.clone()
	began := slices.ContainsFunc(t.at.offsets, func(o int64) bool { return o > 0 })
	if t.bulk {
		t.limits = t.e.bulk
	}
	t.rows = newRowCache(t.model.Append, !began, t.limits.rows)
	return t.loadParked(ctx)
}

// limits bound the memory that a task takes, and the size of its transactions.
type limits struct {
	events int // in one batch
	bytes  int // of data in one batch
	rows   int // kept in memory
	copied int // new rows that are worth a COPY
}

const (
	batchBytes = 8 << 20
	cachedRows = 500
	copiedRows = 100

	// A position without rows is stored so that a transaction's time is such a part of all the time.
	emptyShare = 100
)

// bulkLimits are those of a task that fills a build.
var bulkLimits = limits{events: 20_000, bytes: 16 << 20, rows: 5_000, copied: copiedRows}

// run follows the topics until ctx ends, or an error, or until it is at the given offset of each topic, if there are any,
// or beyond, and has stored that. It never reads beyond them. It can be run again then. When the table refuses a row, it goes over the batch again,
// one event after the other, so that only the one that is at fault is parked.
func (t *task) run(ctx context.Context, until []int64) error {
	for {
		err := t.follow(ctx, until)
		var refused *refusedError
		var halt *haltError
		if errors.As(err, &halt) || !errors.As(err, &refused) && !errors.Is(err, errMoved) {
			return err
		}
		upTo := t.at.clone()
		for i := range upTo.offsets {
			upTo.offsets[i] = max(upTo.offsets[i], t.careful.offset(i), t.tried.offset(i))
		}
		if err := t.reload(ctx); err != nil {
			return err
		}
		t.careful = upTo
	}
}

func (t *task) follow(ctx context.Context, until []int64) error {
	if t.at.passed(until) {
		return t.flush(ctx)
	}
	feeding, stop := context.WithCancel(ctx)
	var feeds sync.WaitGroup
	defer feeds.Wait()
	defer stop()
	chunks := make(chan chunk)
	for i := range t.model.Topics {
		from, last, to := t.at.offsets[i], t.at.seqs[i], int64(math.MaxInt64)
		if until != nil {
			to = until[i]
		}
		if from < to {
			feeds.Go(func() { t.feed(feeding, i, from, to, last, chunks) })
		}
	}
	for {
		batch, err := t.collect(ctx, chunks, until)
		if err != nil {
			return err
		}
		done, err := t.store(ctx, batch, until)
		if err != nil || done {
			return err
		}
	}
}

// store folds the batch, and writes what comes of it. It is done when it is where it should end.
func (t *task) store(ctx context.Context, b batch, until []int64) (done bool, err error) {
	if b.turn != nil {
		defer b.turn.end()
	}
	if err := t.fold(ctx, b); err != nil {
		return false, err
	}
	done = t.at.passed(until)
	if !t.bulk || t.rows.full() || b.halt != nil || done {
		if err := t.flush(ctx); err != nil {
			return false, err
		}
	}
	return done, b.halt
}

func (p position) passed(until []int64) bool {
	for i, offset := range until {
		if p.offsets[i] < offset {
			return false
		}
	}
	return until != nil
}

// chunk is what one read of a topic brought.
type chunk struct {
	topic   int
	events  []arrival // that the model listens to
	next    int64     // offset
	seq     int64     // of the last event read
	records int64
	bytes   int64
	skipped int64
	seen    time.Time // of the last event
	halt    error     // after these events
}

// arrival is an event as it came in.
type arrival struct {
	projections.Event
	offset int64 // in the public topic
	bad    error // why it cannot be decoded
}

var errForeign = errors.New("it is no event of ours")

var errEnough = errors.New("enough")

// feed reads one topic from one offset up to another, where `last` is the journalseq of the event before.
func (t *task) feed(ctx context.Context, topic int, from, to, last int64, chunks chan<- chunk) {
	name := t.model.Topics[topic]
	hand := func(c chunk) error {
		select {
		case chunks <- c:
			return c.halt
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := t.e.Source(name).Read(ctx, t.partition, from, func(b journal.Batch) error {
		c := chunk{topic: topic, next: min(b.Next, to)}
		leaveOut := func(r journal.Record, why error) {
			if c.skipped++; c.skipped == 1 { // the others are counted
				t.log.Warn("a record is left out", "topic", name, "offset", r.Offset, "err", why)
			}
		}
		for _, r := range b.Records {
			if r.Offset >= to {
				break
			}
			recorded, ours := journal.ParseEvent(name, r)
			if !ours {
				leaveOut(r, errForeign)
				continue
			}
			process, err := journal.Next(last, recorded)
			if err != nil {
				c.next, c.halt = r.Offset, haltf("offset %d: %w", r.Offset, err)
				break
			}
			if !process {
				continue
			}
			last = recorded.Seq
			c.seen = recorded.Time
			if t.discarded[place{topic, recorded.Seq}] {
				continue
			}
			event, listens, err := t.model.Decode(recorded)
			listens = listens && (t.listens == nil || t.listens(event))
			if errors.Is(err, projections.ErrUnreadable) {
				leaveOut(r, err)
				err = nil
			}
			if listens {
				if c.events == nil {
					c.events = make([]arrival, 0, len(b.Records))
				}
				c.events = append(c.events, arrival{event, r.Offset, err})
				c.bytes += int64(len(event.Data)) + 256
			}
		}
		if cap(c.events) > 2*len(c.events) {
			c.events = slices.Clone(c.events) // it may be kept for a while
		}
		c.seq, c.records, from = last, c.next-from, c.next
		if err := hand(c); err != nil || from < to {
			return err
		}
		return errEnough
	})
	var halt *haltError
	if err != nil && ctx.Err() == nil && !errors.As(err, &halt) && !errors.Is(err, errEnough) {
		// Passing faults are retried inside Read: what comes out is here to stay.
		_ = hand(chunk{topic: topic, next: from, seq: last, halt: haltf("read %s: %w", name, err)})
	}
}

// batch is what is folded at once.
type batch struct {
	chunks []chunk
	at     position // after it
	events int
	bytes  int
	halt   error
	turn   *turn // of a batch with events, if the task takes turns
}

// collect waits for a chunk and takes what else is there, up to the limits, until it is the task's turn.
func (t *task) collect(ctx context.Context, chunks <-chan chunk, until []int64) (b batch, err error) {
	b.at = t.at.clone()
	b.at.skipped = 0
	add := func(c chunk) {
		b.chunks = append(b.chunks, c)
		b.at.offsets[c.topic], b.at.seqs[c.topic] = c.next, c.seq
		b.at.skipped += c.skipped
		if c.seen.After(b.at.seen) {
			b.at.seen = c.seen
		}
		b.events += len(c.events)
		b.bytes += int(c.bytes)
		b.halt = c.halt
		if t.moved != nil {
			t.moved(c.records, c.bytes)
		}
	}
	defer func() {
		if err != nil && b.turn != nil {
			b.turn.giveUp()
		}
	}()
	var due <-chan time.Time // when a position without rows is stored
	for {
		full := t.full(b) || b.halt != nil || b.at.passed(until)
		if b.events > 0 && t.turns != nil && b.turn == nil {
			b.turn = t.turns.ask(ctx)
		}
		more, granted := chunks, b.turn.granted()
		switch {
		case full:
			if more = nil; granted == nil {
				return b, nil
			}
		case b.chunks != nil: // what is there comes along, whose turn it is or not
			select {
			case c := <-chunks:
				add(c)
				continue
			default:
			}
			if t.turns == nil {
				return b, nil
			}
			if b.turn == nil && due == nil {
				due = time.After(time.Until(t.last.Add(min(emptyShare*t.took, t.e.Interval))))
			}
		}
		select {
		case c := <-more:
			add(c)
		case err := <-granted:
			if err != nil {
				b.turn = nil
			}
			return b, err
		case <-due:
			if b.turn == nil {
				return b, nil
			}
		case <-ctx.Done():
			return b, ctx.Err()
		}
	}
}

// full says that the batch is as large as it may be.
func (t *task) full(b batch) bool { return b.events >= t.limits.events || b.bytes >= t.limits.bytes }

// fold applies the batch to the rows in memory.
func (t *task) fold(ctx context.Context, b batch) error {
	t.tried = b.at
	for _, c := range b.chunks {
		if t.at.offsets[c.topic] < t.careful.offset(c.topic) {
			// One topic may be beyond what the others have yet to go over: all or none of a batch goes one by one.
			t.careful = b.at.clone()
			break
		}
	}
	touches := make([]touch, 0, b.events)
	for _, c := range b.chunks {
		for i := range c.events {
			keys, err := t.keysOf(&c.events[i])
			if err == nil && t.wanted != nil && !slices.ContainsFunc(keys, t.wanted) {
				continue
			}
			touches = append(touches, touch{&c.events[i], c.topic, keys, err})
		}
	}
	if err := t.fetch(ctx, t.pool, touches...); err != nil {
		return err
	}
	for _, event := range touches {
		if err := t.takeOne(ctx, event); err != nil {
			return err
		}
	}
	b.at.skipped += t.at.skipped
	t.at = b.at
	return nil
}

// touch is an event and the rows that it touches.
type touch struct {
	*arrival
	topic int
	keys  []any
	err   error // why it cannot be applied
}

// keysOf is the keys of the rows that the event touches.
func (t *task) keysOf(event *arrival) (keys []any, err error) {
	if event.bad != nil {
		return nil, event.bad
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s cannot tell the event's rows: %v", t.model.Name, p)
		}
	}()
	return t.model.Touched(event.Event), nil
}

func (t *task) takeOne(ctx context.Context, event touch) error {
	topic := event.topic
	if event.offset >= t.careful.offset(topic) {
		return t.take(event)
	}
	// One by one: what one event did is stored at once, and if the table refuses that, the event is parked.
	if err := t.fetch(ctx, t.pool, event); err != nil {
		return err
	}
	store := func() error {
		t.at.offsets[topic], t.at.seqs[topic] = event.offset+1, event.Seq
		return t.flush(ctx)
	}
	err := t.take(event)
	if err == nil {
		err = store()
	}
	var refused *refusedError
	if !errors.As(err, &refused) {
		return err
	}
	before := t.stored
	if err := t.reload(ctx); err != nil {
		return err
	}
	if !slices.Equal(t.at.offsets, before.offsets) || t.at.offsets[topic] > event.offset {
		return errMoved // there was more in memory than this event, or somebody else is at work: once more from there
	}
	event.err = refused
	if err := t.park(event); err != nil {
		return err
	}
	if err := store(); err != nil {
		if errors.As(err, &refused) {
			return &haltError{fmt.Errorf("an event cannot be parked: %w", err)}
		}
		return err
	}
	return nil
}

func (p position) offset(topic int) int64 {
	if p.offsets == nil {
		return 0
	}
	return p.offsets[topic]
}

// take applies one event, or parks it. Either all of its rows have it or none.
func (t *task) take(event touch) error {
	if event.err != nil || t.parked.behind(t.model, event) {
		return t.park(event)
	}
	rows, before := make([]*cached, len(event.keys)), make([]any, len(event.keys))
	for i, key := range event.keys {
		r := t.rows.get(key)
		if r == nil {
			if err := t.own(key, event.Event); err != nil {
				return err
			}
			r = t.rows.add(key, t.model.New(), false)
		}
		if rows[i] = r; len(rows) > 1 {
			before[i] = t.model.Clone(r.row)
		}
		if event.err = t.apply(key, r.row, event.Event); event.err != nil {
			for j := range i {
				rows[j].row = before[j]
			}
			return t.park(event)
		}
	}
	for _, r := range rows {
		if t.wanted == nil || t.wanted(r.key) {
			t.rows.touch(r)
		}
	}
	return nil
}

// apply is the model's Apply, whose panic is an error.
func (t *task) apply(key, row any, event projections.Event) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s cannot apply the event: %v", t.model.Name, p)
		}
	}()
	t.model.Apply(key, row, event)
	return nil
}

// own asserts that the row is written by this task alone.
func (t *task) own(key any, event projections.Event) error {
	stream, p := t.model.Owner(key)
	if p == nil {
		p = new(journal.Partition([]byte(stream), t.build.partitions))
	}
	if *p != t.partition {
		return haltf("event %v of partition %d touches a row of %s that lives in partition %d: "+
			"restore the topic as its service published it, and start what reads it anew",
			event.Position, t.partition, t.model.Name, *p)
	}
	return nil
}

// fetch brings the rows that are not in memory from the table, as far as there are any.
func (t *task) fetch(ctx context.Context, db querier, touches ...touch) error {
	if t.model.Append || t.rows.complete {
		return nil
	}
	var rows [][]any
	asked := map[any]bool{}
	for _, event := range touches {
		for _, key := range event.keys {
			if t.rows.get(key) == nil && !asked[key] {
				asked[key] = true
				rows = append(rows, t.model.KeyValues(key))
			}
		}
	}
	if len(rows) == 0 {
		return nil
	}
	columns := t.model.Columns[:t.model.Keys]
	ctx, cancel := t.e.inTime(ctx)
	defer cancel()
	found, err := db.Query(ctx, "SELECT "+columnNames(t.model.Columns)+" FROM "+t.build.table()+
		" WHERE ("+columnNames(columns)+") IN (SELECT * FROM "+unnest(columns)+")", arrays(columns, rows)...)
	if err == nil {
		for found.Next() {
			var key, row any
			if key, row, err = t.model.Scan(found); err != nil {
				break
			}
			t.rows.add(key, row, true)
		}
		found.Close()
		err = errors.Join(err, found.Err())
	}
	if err != nil {
		return fmt.Errorf("read rows of %s: %w", t.model.Name, err)
	}
	return nil
}

// unnest is arrays as a table: one parameter a column.
func unnest(columns []projections.Column) string {
	params := make([]string, len(columns))
	for i, c := range columns {
		// A cast to a length would cut a text off, which the table refuses.
		params[i] = "$" + strconv.Itoa(i+1) + "::" + c.BaseType() + "[]"
	}
	return "unnest(" + strings.Join(params, ", ") + ")"
}

// arrays turns rows into columns.
func arrays(columns []projections.Column, rows [][]any) []any {
	params := make([]any, len(columns))
	for i := range columns {
		switch rows[0][i].(type) { // pgx is quicker with slices of a type
		case string:
			params[i] = array[string](rows, i)
		case int64:
			params[i] = array[int64](rows, i)
		case time.Time:
			params[i] = array[time.Time](rows, i)
		case [16]byte:
			params[i] = array[[16]byte](rows, i)
		default:
			params[i] = mixed(rows, i)
		}
	}
	return params
}

func array[T any](rows [][]any, i int) any {
	column := make([]T, len(rows))
	for j, row := range rows {
		value, ok := row[i].(T)
		if !ok {
			return mixed(rows, i)
		}
		column[j] = value
	}
	return column
}

func mixed(rows [][]any, i int) any {
	column := make([]any, len(rows))
	for j, row := range rows {
		column[j] = row[i]
	}
	return column
}

// refusedError says that the table cannot hold a row, and never will.
type refusedError struct{ err error }

func (r *refusedError) Error() string { return r.err.Error() }
func (r *refusedError) Unwrap() error { return r.err }

var errMoved = errors.New("somebody else has moved the task")

// flush stores what has changed since the last time: rows, parked events and position, in one transaction.
func (t *task) flush(ctx context.Context) error {
	t.last = time.Now()
	if slices.Equal(t.at.offsets, t.stored.offsets) && slices.Equal(t.at.seqs, t.stored.seqs) {
		return nil
	}
	var fresh, changed []*cached
	for _, r := range t.rows.dirty {
		if r.stored {
			changed = append(changed, r)
		} else {
			fresh = append(fresh, r)
		}
	}
	if len(fresh) < t.limits.copied {
		fresh, changed = nil, t.rows.dirty
	}
	values, err := t.values(changed)
	if err != nil {
		return err
	}
	events := int64(0)
	for i := range t.at.seqs {
		events += t.at.seqs[i] - t.stored.seqs[i]
	}
	ctx, cancel := t.e.inTime(ctx)
	defer cancel()
	batch := &pgx.Batch{}
	batch.Queue("SELECT wharf.advance($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)", t.build.id, t.partition, t.build.state,
		t.epoch, t.stored.offsets, t.stored.seqs, t.at.offsets, t.at.seqs, t.at.skipped, events, t.at.seen)
	if len(changed) > 0 {
		batch.Queue(t.upsert(), arrays(t.model.Columns, values)...)
	}
	if err := t.parked.queue(batch, t.build.id, t.partition); err != nil {
		return err
	}
	if len(fresh) == 0 {
		err = t.pool.SendBatch(ctx, batch).Close() // one round trip, and one transaction
	} else {
		rows := &copied{model: t.model, rows: fresh}
		rows.buf.WriteString(copyHeader)
		err = pgx.BeginFunc(ctx, t.pool, func(tx pgx.Tx) error {
			if err := tx.SendBatch(ctx, batch).Close(); err != nil {
				return err
			}
			_, err := tx.Conn().PgConn().CopyFrom(ctx, rows, t.copyFrom())
			return err
		})
		if refused := rows.refused.Load(); refused != nil {
			return refused
		}
	}
	if err != nil {
		return t.failed(err)
	}
	t.took += (time.Since(t.last) - t.took) / 8
	t.at.skipped = 0
	t.stored = t.at.clone()
	t.rows.flushed()
	t.parked.stored()
	return nil
}

// refusals are the classes of errors that are the row's own: of data, of constraints, of what a program may ask for.
var refusals = []string{"22", "23", "54"}

// isRefusal says that Postgres does not take a row.
func isRefusal(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && slices.Contains(refusals, pg.Code[:min(2, len(pg.Code))])
}

// failed says what an error of a transaction that wrote rows means.
func (t *task) failed(err error) error {
	// A value that does not even fit the column's type is found by pgx, which has no type for that error.
	if isRefusal(err) || strings.Contains(err.Error(), "failed to encode args[") || strings.Contains(err.Error(), "unable to encode ") {
		return &refusedError{fmt.Errorf("%s cannot hold a row: %w", t.build.table(), err)}
	}
	return fmt.Errorf("write rows of %s: %w", t.model.Name, err)
}

func (t *task) upsert() string {
	sql := "INSERT INTO " + t.build.table() + " (" + columnNames(t.model.Columns) + ") SELECT * FROM " +
		unnest(t.model.Columns)
	if t.model.Append {
		return sql
	}
	key, rest := t.model.Columns[:t.model.Keys], t.model.Columns[t.model.Keys:]
	sets := make([]string, len(rest))
	for i, c := range rest {
		sets[i] = quote(c.Name) + " = EXCLUDED." + quote(c.Name)
	}
	return sql + " ON CONFLICT (" + columnNames(key) + ") DO UPDATE SET " + strings.Join(sets, ", ")
}

func (t *task) copyFrom() string {
	return "COPY " + t.build.table() + " (" + columnNames(t.model.Columns) + ") FROM STDIN (FORMAT binary)"
}

// values is the rows as arrays takes them.
func (t *task) values(rows []*cached) (all [][]any, err error) {
	for _, r := range rows {
		values, err := t.model.Values(r.key, r.row)
		if err != nil {
			return nil, &refusedError{err}
		}
		all = append(all, values)
	}
	return all, nil
}

// copied reads as rows do in COPY, in binary. It begins with copyHeader, and there is one row at least.
type copied struct {
	model   projections.Model
	rows    []*cached // to come
	buf     bytes.Buffer
	refused atomic.Pointer[refusedError] // a row that no table can hold; pgx may still be reading when it gives up
}

const (
	copyHeader  = "PGCOPY\n\xff\r\n\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00"
	copyTrailer = "\xff\xff"
)

func (c *copied) Read(to []byte) (int, error) {
	for len(c.rows) > 0 && c.buf.Len() < len(to) {
		row, err := c.model.AppendCopy(c.buf.AvailableBuffer(), c.rows[0].key, c.rows[0].row)
		if err != nil {
			c.refused.Store(&refusedError{err})
			return 0, err
		}
		c.buf.Write(row)
		if c.rows = c.rows[1:]; len(c.rows) == 0 {
			c.buf.WriteString(copyTrailer)
		}
	}
	return c.buf.Read(to)
}

// rowCache is rows in memory. The task alone writes them, so what is here need not be read again. When there are more
// than `most`, those that have not been used for the longest time go.
type rowCache struct {
	once       bool // no row is touched twice: none is kept
	complete   bool // no row is in the table that is not here
	most       int
	young, old map[any]*cached
	dirty      []*cached
}

type cached struct {
	key, row any
	stored   bool // the table has the row, perhaps older
	dirty    bool
}

func newRowCache(once, complete bool, most int) rowCache {
	return rowCache{once: once, complete: complete && !once, most: most, young: map[any]*cached{}}
}

// get is nil when the row is not here.
func (c *rowCache) get(key any) *cached {
	r := c.young[key]
	if r == nil {
		if r = c.old[key]; r != nil {
			c.young[key] = r
		}
	}
	return r
}

func (c *rowCache) add(key, row any, stored bool) *cached {
	r := &cached{key: key, row: row, stored: stored}
	if !c.once {
		c.young[key] = r
	}
	return r
}

// touch marks the row as one to be written.
func (c *rowCache) touch(r *cached) {
	if !r.dirty {
		r.dirty = true
		c.dirty = append(c.dirty, r)
	}
}

func (c *rowCache) full() bool { return len(c.dirty) >= c.most }

// release lets all rows go, which have been written: they are read again when they are needed.
func (c *rowCache) release() {
	c.complete = c.complete && len(c.young)+len(c.old) == 0
	c.young, c.old = map[any]*cached{}, nil
}

// flushed says that all rows have been written.
func (c *rowCache) flushed() {
	for _, r := range c.dirty {
		r.dirty, r.stored = false, true
	}
	c.dirty = nil
	if len(c.young) >= c.most {
		c.complete = c.complete && len(c.old) == 0
		c.young, c.old = map[any]*cached{}, c.young
	}
}
