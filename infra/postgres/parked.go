package postgres

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"wharf/domain"
	"wharf/infra/journal"
	"wharf/projections"
)

// How an event that cannot be applied is kept from stopping the others, and from being lost.
//
// It is parked, with its error, and so is every later event of its topic that has a key in common with one that is parked:
// its stream, or a row that it touches. So the order of events is kept within a stream and within a row, and everything
// else goes on, events of the same row from other topics included: between topics there is no order, and what is parked
// must not depend on how they were read, or a replay would park other events than the live build did. The parked events and
// the task's position move in one transaction. Rows that miss an event are stale, which their view says. A repair
// (RetryParked) applies the events in their order, after the program was mended; DiscardParked gives one up, in this build
// and every later one.

var parkedEvents = promauto.NewGaugeVec(prometheus.GaugeOpts{
	Name: "wharf_projection_parked_events",
	Help: "Events that wait because they, or one before them, could not be applied to the read model.",
}, []string{"model", "state", "partition"})

// parked is the parked events of a task.
type parked struct {
	keys  map[topicKey]bool // what is waited for
	count int
	fresh []parkedEvent // not yet stored
	gauge prometheus.Gauge
}

type parkedEvent struct {
	event domain.Recorded
	keys  []string
	err   string
}

// topicKey is a key of parked events of a topic.
type topicKey struct{ topic, key string }

// place is an event's in the topics of a task.
type place struct {
	topic int
	seq   int64
}

// keysOfParked are the keys that an event has when it is parked: its stream, the texts of its rows' keys, and the streams
// that those rows tell of.
func keysOfParked(m projections.Model, event touch) []string {
	keys := []string{short(event.Stream)}
	for _, key := range event.keys {
		for _, text := range []string{short(m.KeyText(key)), short(streamOf(m, key))} {
			if text != "" && !slices.Contains(keys, text) {
				keys = append(keys, text)
			}
		}
	}
	return keys
}

// longestKey is how many bytes of a parked event's key are kept as they are. An index takes some 2,700, or more if they can be
// compressed.
const longestKey = 1000

// short is the key, or its hash if it is too long.
func short(key string) string {
	if len(key) <= longestKey {
		return key
	}
	return fmt.Sprintf("%x", sha256.Sum256([]byte(key)))
}

// shortSQL is the same of a text in SQL.
func shortSQL(text string) string {
	return fmt.Sprintf("CASE WHEN octet_length(%[1]s) <= %[2]d THEN %[1]s ELSE encode(sha256(convert_to(%[1]s, 'UTF8')), 'hex') END",
		text, longestKey)
}

// streamOf is the stream that the row of the key tells of, if it tells of one.
func streamOf(m projections.Model, key any) string {
	i := slices.IndexFunc(m.Columns[:m.Keys], func(c projections.Column) bool { return c.Name == m.Stream })
	if i < 0 {
		return ""
	}
	value := m.KeyValues(key)[i]
	if id, ok := value.([16]byte); ok {
		return uuid.UUID(id).String()
	}
	return fmt.Sprint(value)
}

// behind says whether the event must wait for one that is parked.
func (p *parked) behind(m projections.Model, event touch) bool {
	if p.count == 0 {
		return false
	}
	return slices.ContainsFunc(keysOfParked(m, event), func(key string) bool { return p.keys[topicKey{event.Topic, key}] })
}

// park puts the event aside: for its error, or because it has to wait.
func (t *task) park(event touch) error {
	if t.parked.count >= t.e.Park { // so much is no exception any more
		if i := slices.Index(t.model.Topics, event.Topic); event.offset >= t.careful.offset(i) {
			return &refusedError{errors.New("too many events are parked")} // store those before it first, one by one
		}
		return haltf("%d events are parked, and more are not kept: mend the program and retry them, or discard those that "+
			"hold up the others (wharf parked)", t.parked.count)
	}
	e := parkedEvent{event.Recorded, keysOfParked(t.model, event), ""}
	if event.err != nil {
		e.err = legible(event.err.Error())
		level := slog.LevelError
		if t.quiet {
			level = slog.LevelDebug
		}
		t.log.Log(context.Background(), level, "an event cannot be applied and is parked: what comes after it on the same stream or row waits",
			"event", event.Position.String(), "name", event.Name, "stream", event.Stream, "err", event.err)
	}
	t.parked.add(event.Topic, e.keys)
	t.parked.fresh = append(t.parked.fresh, e)
	return nil
}

// legible is the text without what Postgres does not take.
func legible(text string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}

func (p *parked) add(topic string, keys []string) {
	p.count++
	for _, key := range keys {
		p.keys[topicKey{topic, key}] = true
	}
	if p.gauge != nil {
		p.gauge.Set(float64(p.count))
	}
}

// queue adds the statement that stores the fresh ones.
func (p *parked) queue(batch *pgx.Batch, build int64, partition int32) error {
	for _, e := range p.fresh {
		event, err := json.Marshal(e.event)
		if err != nil {
			return fmt.Errorf("park an event: %w", err)
		}
		batch.Queue(`INSERT INTO wharf.parked (build, partition, topic, seq, keys, error, event)
			VALUES ($1, $2, $3, $4, $5, $6, $7)`, build, partition, e.event.Topic, e.event.Seq, e.keys, e.err, event)
	}
	return nil
}

func (p *parked) stored() { p.fresh = nil }

// loadParked reads what is parked of the task, and what was given up of the model.
func (t *task) loadParked(ctx context.Context) error {
	t.parked = parked{keys: map[topicKey]bool{}, gauge: t.parked.gauge}
	rows, err := t.pool.Query(ctx, "SELECT topic, keys FROM wharf.parked WHERE build = $1 AND partition = $2", t.build.id, t.partition)
	if err != nil {
		return err
	}
	var topic string
	var keys []string
	if _, err := pgx.ForEachRow(rows, []any{&topic, &keys}, func() error { t.parked.add(topic, keys); return nil }); err != nil {
		return err
	}
	t.discarded = map[place]bool{}
	givenUp, err := t.e.givenUp(ctx, t.pool, t.model.Name)
	for _, d := range givenUp {
		if i := slices.Index(t.model.Topics, d.at.Topic); i >= 0 && d.at.Partition == t.partition {
			t.discarded[place{i, d.at.Seq}] = true
		}
	}
	return err
}

// ParkedEvent is an event that waits, as people see it.
type ParkedEvent struct {
	Model    string          `json:"model"`
	Build    int64           `json:"build"`
	State    string          `json:"state"` // of the build
	Position string          `json:"position"`
	ID       uuid.UUID       `json:"id"`
	Name     string          `json:"type"`
	Service  string          `json:"service"`
	Stream   string          `json:"stream"`
	Version  int64           `json:"version"` // of the stream after it
	Time     time.Time       `json:"time"`
	Cause    string          `json:"cause,omitempty"`
	Keys     []string        `json:"keys"`            // what waits: streams, and rows by the text of their key
	Error    string          `json:"error,omitempty"` // empty for one that waits for another
	ParkedAt time.Time       `json:"parked_at"`
	Data     json.RawMessage `json:"data,omitempty"`
	Text     string          `json:"text,omitempty"` // the data, where it is no JSON
}

// showParked has a metric tell how much of the task is parked, until end is called.
func (t *task) showParked() (end func()) {
	labels := []string{t.model.Name, t.build.state, strconv.Itoa(int(t.partition))}
	t.parked.gauge = parkedEvents.WithLabelValues(labels...)
	t.parked.gauge.Set(float64(t.parked.count))
	return func() { parkedEvents.DeleteLabelValues(labels...) }
}

// Parked lists what waits of the live build and then of the previous one, those of one model if it is named, in the order
// in which the events came.
func (e *Engine) Parked(ctx context.Context, model string) ([]ParkedEvent, error) {
	rows, err := e.pool.Query(ctx, `SELECT b.model, b.id, b.state, k.topic || '/' || k.partition || '/' || k.seq,
			k.keys, k.error, k.parked_at, k.event
		FROM wharf.parked k JOIN wharf.builds b ON b.id = k.build
		WHERE b.state IN ('live', 'previous') AND ($1 = '' OR b.model = $1) ORDER BY b.model, b.state, k.partition, k.nr`, model)
	if err != nil {
		return nil, fmt.Errorf("list the parked events: %w", err)
	}
	list, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (p ParkedEvent, err error) {
		var recorded domain.Recorded
		var event []byte
		err = r.Scan(&p.Model, &p.Build, &p.State, &p.Position, &p.Keys, &p.Error, &p.ParkedAt, &event)
		if err == nil {
			err = json.Unmarshal(event, &recorded)
		}
		p.ID, p.Name, p.Service, p.Stream, p.Version = recorded.ID, recorded.Name, recorded.Service, recorded.Stream, recorded.Version
		p.Time, p.Cause, p.ParkedAt = recorded.Time, recorded.Cause.String(), p.ParkedAt.UTC()
		if p.Data = recorded.Data; !json.Valid(recorded.Data) {
			p.Data, p.Text = nil, string(recorded.Data)
		}
		return p, err
	})
	if err != nil {
		return nil, fmt.Errorf("list the parked events: %w", err)
	}
	return list, nil
}

// Discarded is an event that was given up.
type Discarded struct {
	Model    string    `json:"model"`
	Position string    `json:"position"`
	At       time.Time `json:"at"`

	at domain.Position
}

// DiscardedEvents lists what was given up, of one model if it is named.
func (e *Engine) DiscardedEvents(ctx context.Context, model string) ([]Discarded, error) {
	list, err := e.givenUp(ctx, e.pool, model)
	if err != nil {
		return nil, fmt.Errorf("list the events that were given up: %w", err)
	}
	return list, nil
}

// givenUp is what was given up of the topics that there are.
func (e *Engine) givenUp(ctx context.Context, db querier, model string) (list []Discarded, err error) {
	rows, err := db.Query(ctx, `SELECT model, topic, partition, seq, topic_id, discarded_at FROM wharf.discarded
		WHERE $1 = '' OR model = $1 ORDER BY discarded_at, model, topic, partition, seq`, model)
	if err != nil {
		return nil, err
	}
	list = []Discarded{}
	var d Discarded
	var id string
	_, err = pgx.ForEachRow(rows, []any{&d.Model, &d.at.Topic, &d.at.Partition, &d.at.Seq, &id, &d.At}, func() error {
		if !projections.IsAnother(id, e.TopicIDs[d.at.Topic]) {
			d.Position, d.At = d.at.String(), d.At.UTC()
			list = append(list, d)
		}
		return nil
	})
	return list, err
}

// Repaired is what a retry has come to.
type Repaired struct {
	Applied  int64 `json:"applied"`  // to the live build
	Waiting  int64 `json:"waiting"`  // that are still parked in it
	Previous int64 `json:"previous"` // that are still parked in the previous build
}

// RetryParked tries the model's parked events again, in their order, on the live build and the previous one: all of
// them, or those with the key (a stream, or the text of a row's key), of which there has to be one. One that fails again
// stays, and so does what waits for it. It needs a program that knows the builds' version, and works whether projectors run or
// not. The error is ErrReplaying while somebody builds the read model anew.
func (e *Engine) RetryParked(ctx context.Context, model, key string) (done Repaired, err error) {
	tried := 0
	err = e.eachParked(ctx, model, func(m projections.Model, b build, partition int32) error {
		one, n, err := e.repair(ctx, m, b, partition, short(key))
		if b.state == live {
			done.Applied, done.Waiting = done.Applied+one.Applied, done.Waiting+one.Waiting
		} else {
			done.Previous += one.Waiting
		}
		tried += n
		return err
	})
	if err == nil && key != "" && tried == 0 {
		err = fmt.Errorf("%w: nothing that waits has the key %s", ErrNotParked, key)
	}
	if err != nil {
		return done, fmt.Errorf("retry the parked events of %s: %w", model, err)
	}
	return done, nil
}

// ErrNotParked says that no such event is parked.
var ErrNotParked = errors.New("no such event is parked")

var errNotLive = errors.New("only the previous build waits for the event, and the live one has applied it, or has yet to come to it: " +
	"retry what is parked instead")

// DiscardParked gives up the event at the position, which is parked in the live build: no build of the model ever applies it.
// What waited for it waits until it is retried.
func (e *Engine) DiscardParked(ctx context.Context, model, position string) error {
	m, err := projections.Find(e.Models, model)
	if err != nil {
		return err
	}
	found, err := e.discard(ctx, m, position)
	if err == nil && !found {
		err = ErrNotParked
	}
	if err != nil {
		return fmt.Errorf("discard %s of %s: %w", position, model, err)
	}
	return nil
}

// discard finds the event in the live build first, or given up before.
func (e *Engine) discard(ctx context.Context, m projections.Model, position string) (found bool, err error) {
	before, err := e.givenUp(ctx, e.pool, m.Name)
	if err != nil {
		return false, err
	}
	found = slices.ContainsFunc(before, func(d Discarded) bool { return d.Position == position })
	at, err := journal.ParsePosition(position)
	if err != nil {
		return found, nil // no event has it
	}
	err = e.eachParked(ctx, m.Name, func(m projections.Model, b build, partition int32) error {
		if partition != at.Partition {
			return nil
		}
		return pgx.BeginFunc(ctx, e.pool, func(tx pgx.Tx) error {
			if err := touchTask(ctx, tx, b, partition); err != nil {
				return err
			}
			tag, err := tx.Exec(ctx, `WITH gone AS (DELETE FROM wharf.parked
					WHERE build = $1 AND partition = $2 AND topic || '/' || partition || '/' || seq = $3 RETURNING topic, seq)
				INSERT INTO wharf.discarded (model, partition, topic, seq, topic_id)
				SELECT $4, $2, topic, seq, coalesce(($5::jsonb)->>topic, '') FROM gone
				ON CONFLICT (model, partition, topic, seq) DO UPDATE SET discarded_at = now(), topic_id = EXCLUDED.topic_id`,
				b.id, partition, position, m.Name, b.ids())
			if err == nil && tag.RowsAffected() > 0 && b.state == previous && !found {
				return errNotLive
			}
			found = found || tag.RowsAffected() > 0
			return err
		})
	})
	return found, err
}

// eachParked calls f for each task of the live build, and then of the previous one, that has parked events, while nobody swaps
// another build in, which would not know of what f does.
func (e *Engine) eachParked(ctx context.Context, model string, f func(projections.Model, build, int32) error) error {
	m, err := projections.Find(e.Models, model)
	if err != nil {
		return err
	}
	r, end, err := e.open(ctx, m, func(Progress) {})
	if err != nil {
		return err
	}
	defer end()
	if err := r.lockModel(ctx); err != nil {
		return err
	}
	all, err := builds(ctx, e.pool, live, previous)
	if err != nil {
		return err
	}
	for _, b := range all {
		if b.model != m.Name {
			continue
		}
		rows, err := e.pool.Query(ctx, "SELECT DISTINCT partition FROM wharf.parked WHERE build = $1 ORDER BY 1", b.id)
		if err != nil {
			return err
		}
		partitions, err := pgx.CollectRows(rows, pgx.RowTo[int32])
		if err != nil {
			return err
		}
		if len(partitions) > 0 && b.version != m.Version {
			if b.state == previous {
				continue // its own program's
			}
			return fmt.Errorf("the live build is of version %d, and this program has version %d: use the program that made it",
				b.version, m.Version)
		}
		for _, p := range partitions {
			err := e.ofThisLog(b)
			if err == nil {
				err = f(m, b, p)
			}
			if b.state == previous && (errors.Is(err, errOtherLog) || errors.Is(err, errSwapped)) {
				break // nobody goes back to it, or it has retired meanwhile
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

var errSwapped = errors.New("another build was swapped in meanwhile: try again")

// touchTask holds the task up until the transaction ends, and makes whoever runs it begin anew after that, because what
// it has in memory is stale then. It is an error when the build has another state by now.
func touchTask(ctx context.Context, tx pgx.Tx, b build, partition int32) error {
	_, err := tx.Exec(ctx, "UPDATE wharf.tasks SET epoch = epoch + 1, error = '' WHERE build = $1 AND partition = $2", b.id, partition)
	if err != nil {
		return err
	}
	// A swap holds the tasks of the live build up, too.
	var same bool
	err = tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM wharf.builds WHERE id = $1 AND state = $2)", b.id, b.state).Scan(&same)
	if err == nil && !same {
		err = errSwapped
	}
	return err
}

// repairs is how many parked events of a task are applied in one transaction: while it lasts the task stands still, and a row
// that is written over and over in it gets slower each time.
const repairs = 500

// repair applies what can be applied of one task's parked events, and says how many were tried.
func (e *Engine) repair(ctx context.Context, m projections.Model, b build, partition int32, key string) (done Repaired, tried int, err error) {
	for {
		some, meant, err := e.repairSome(ctx, m, b, partition, key)
		tried = max(tried, meant)
		if err != nil {
			return done, tried, err
		}
		done.Applied, done.Waiting = done.Applied+some.Applied, some.Waiting
		if some.Applied < repairs {
			return done, tried, nil
		}
	}
}

// repairSome does it in one transaction, until so many are applied; then it does not know how many wait.
func (e *Engine) repairSome(ctx context.Context, m projections.Model, b build, partition int32, key string) (done Repaired, tried int, err error) {
	t, err := e.load(ctx, e.pool, m, b, partition)
	if err != nil {
		return done, 0, err
	}
	t.quiet = b.state == previous
	err = pgx.BeginFunc(ctx, e.pool, func(tx pgx.Tx) error {
		if err := touchTask(ctx, tx, b, partition); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `SELECT event, keys FROM wharf.parked WHERE build = $1 AND partition = $2 ORDER BY nr`,
			b.id, partition)
		if err != nil {
			return err
		}
		type waiting struct {
			event domain.Recorded
			keys  []string
		}
		list, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (w waiting, err error) {
			var data []byte
			if err = r.Scan(&data, &w.keys); err == nil {
				err = json.Unmarshal(data, &w.event)
			}
			return w, err
		})
		if err != nil {
			return err
		}
		t.parked = parked{keys: map[topicKey]bool{}, gauge: t.parked.gauge}
		for _, w := range list {
			if done.Applied == repairs {
				break
			}
			meant := key == "" || slices.Contains(w.keys, key)
			if meant {
				tried++
			}
			if i := slices.Index(m.Topics, w.event.Topic); t.discarded[place{i, w.event.Seq}] {
				if err := t.unpark(ctx, tx, w.event); err != nil {
					return err
				}
				continue
			}
			if !meant {
				t.parked.add(w.event.Topic, w.keys) // left alone, and waited for
				continue
			}
			applied, err := t.retry(ctx, tx, w.event)
			if err != nil {
				return err
			}
			if applied {
				done.Applied++
			}
		}
		done.Waiting = int64(t.parked.count)
		return nil
	})
	return done, tried, err
}

// retry applies one parked event, if nothing before it is parked still, or writes down why it cannot be applied.
func (t *task) retry(ctx context.Context, tx pgx.Tx, recorded domain.Recorded) (applied bool, err error) {
	event := touch{arrival: &arrival{}}
	event.Event, _, event.bad = t.model.Decode(recorded)
	event.keys, event.err = t.keysOf(event.arrival)
	t.rows = newRowCache(t.model.Append, false, t.limits.rows)
	err = pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error { // a savepoint
		if err := t.fetch(ctx, tx, event); err != nil {
			return err
		}
		if err := t.take(event); err != nil || len(t.parked.fresh) > 0 {
			return err
		}
		changed, err := t.values(t.rows.dirty)
		if err != nil {
			return err
		}
		if len(changed) > 0 { // no batch: pgx gives up the connection when a value of a batch does not fit
			if _, err := tx.Exec(ctx, t.upsert(), arrays(t.model.Columns, changed)...); err != nil {
				return t.failed(err)
			}
		}
		return t.unpark(ctx, tx, recorded)
	})
	var refused *refusedError
	if errors.As(err, &refused) {
		event.err = refused
		err = t.park(event)
	}
	if err != nil || len(t.parked.fresh) == 0 {
		return err == nil, err
	}
	// The keys may be more now: those of rows that an event touches which could not be decoded before.
	_, err = tx.Exec(ctx, "UPDATE wharf.parked SET error = $5, keys = $6 WHERE build = $1 AND partition = $2 AND topic = $3 AND seq = $4",
		t.build.id, t.partition, recorded.Topic, recorded.Seq, t.parked.fresh[0].err, t.parked.fresh[0].keys)
	t.parked.fresh = nil
	return false, err
}

// unpark forgets that the event was parked.
func (t *task) unpark(ctx context.Context, tx pgx.Tx, event domain.Recorded) error {
	_, err := tx.Exec(ctx, "DELETE FROM wharf.parked WHERE build = $1 AND partition = $2 AND topic = $3 AND seq = $4",
		t.build.id, t.partition, event.Topic, event.Seq)
	return err
}
