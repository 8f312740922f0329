package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"wharf/domain"
	"wharf/infra/journal"
	"wharf/projections"
)

// Moment is a point in what has happened: a time, or the place of an event. What had happened at the place of an event
// is all that came before it in its partition, the event itself, and all that was recorded elsewhere until its time.
type Moment struct {
	Time     time.Time
	Position domain.Position // zero for a time
}

// ParseMoment reads a time (RFC 3339) or a position (topic/partition/count, as the history of an order shows it).
func ParseMoment(s string) (Moment, error) {
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return Moment{Time: t}, nil
	}
	p, err := journal.ParsePosition(s)
	switch {
	case err != nil:
		return Moment{}, fmt.Errorf("%q is neither a time such as 2026-11-25T14:00:00Z nor a position such as orders.events/3/17", s)
	case p.Seq < 1:
		return Moment{}, fmt.Errorf("%q is no place of an event: they count from 1", s)
	case !slices.Contains(projections.Topics, p.Topic):
		return Moment{}, fmt.Errorf("%q is of none of the topics %s", s, strings.Join(projections.Topics, ", "))
	}
	return Moment{Position: p}, nil
}

// Before says that this moment is before the other, by the clocks of who recorded them if they are not places of one partition.
// Both are times, or such places, or they have been resolved.
func (m Moment) Before(o Moment) bool {
	if p, q := m.Position, o.Position; p.Topic != "" && p.Topic == q.Topic && p.Partition == q.Partition {
		return p.Seq < q.Seq
	}
	return !m.Time.IsZero() && m.Time.Before(o.Time)
}

func (m Moment) String() string {
	if m.Position.Topic != "" {
		return m.Position.String()
	}
	return m.Time.Format(time.RFC3339Nano)
}

// covers says whether the event had happened at the moment.
func (m Moment) covers(e domain.Recorded) bool {
	if e.Topic == m.Position.Topic && e.Partition == m.Position.Partition {
		return e.Seq <= m.Position.Seq
	}
	return !e.Time.After(m.Time)
}

// resolve finds the time of a position.
func (e *Engine) resolve(ctx context.Context, m *Moment) error {
	p := m.Position
	if p.Topic == "" {
		return nil
	}
	if !slices.Contains(projections.Topics, p.Topic) || int(p.Partition) >= e.Partitions {
		return fmt.Errorf("there is no place %s: the topics are %s, with the partitions 0 to %d", p,
			strings.Join(projections.Topics, ", "), e.Partitions-1)
	}
	end, err := e.Source(p.Topic).End(ctx, p.Partition)
	if err != nil {
		return err
	}
	found := false
	if from := p.Seq - 1; from < end { // every event has a record
		err = read(ctx, e.Source(p.Topic), p.Topic, p.Partition, from, end, func(r domain.Recorded) error {
			if r.Seq >= p.Seq {
				m.Time, found = r.Time, r.Seq == p.Seq
				return errEnough
			}
			return nil
		})
	}
	if err == nil && !found {
		err = fmt.Errorf("there is no event at %s: the last one of its partition comes before it", p)
	}
	return err
}

// read hands the events of the partition on, from one offset up to another, until f returns an error; errEnough is none.
func read(ctx context.Context, r journal.Reader, topic string, partition int32, from, to int64, f func(domain.Recorded) error) error {
	if from >= to {
		return nil
	}
	err := r.Read(ctx, partition, from, func(b journal.Batch) error {
		for _, record := range b.Records {
			if record.Offset >= to {
				return errEnough
			}
			if e, ours := journal.ParseEvent(topic, record); ours {
				if err := f(e); err != nil {
					return err
				}
			}
		}
		if b.Next >= to {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// matcher says of a row's key whether it is meant by the text: that of the whole key, or the id of the stream that the
// row tells of.
func matcher(m projections.Model, text string) func(key any) bool {
	parsed, err := m.ParseKey(text)
	return func(key any) bool {
		return err == nil && key == parsed || m.Keys > 1 && streamOf(m, key) == text
	}
}

// CheckKey says how a key of the model reads, if the text is none: that of a whole key, or the id of the stream that rows tell
// of.
func CheckKey(m projections.Model, text string) error {
	_, err := m.ParseKey(text)
	if err != nil && m.Keys > 1 && m.Stream != "" && text != "" && !strings.Contains(text, "/") {
		return nil
	}
	return err
}

// partitionsOf are those in which rows that the text means may lie.
func (e *Engine) partitionsOf(m projections.Model, text string) (partitions []int32, err error) {
	key, err := m.ParseKey(text)
	if err == nil {
		if stream, p := m.Owner(key); p == nil {
			return []int32{journal.Partition([]byte(stream), e.Partitions)}, nil
		} else if *p >= 0 && int(*p) < e.Partitions {
			return []int32{*p}, nil
		}
		return nil, fmt.Errorf("there are %d partitions", e.Partitions)
	}
	if err := CheckKey(m, text); err != nil {
		return nil, err
	}
	for p := range int32(e.Partitions) {
		partitions = append(partitions, p)
	}
	return partitions, nil
}

// Snapshot is what rows of a read model were at a moment.
type Snapshot struct {
	Model  string           `json:"model"`
	Key    string           `json:"key"`
	Events int64            `json:"events"` // that made the rows
	Rows   []map[string]any `json:"rows"`   // by column, in the order in which they came to be
}

// ErrNoRow says that there was no such row.
var ErrNoRow = errors.New("there is no such row at that moment")

// AsOf is what the rows with the key were at the moment; a nil moment is now. It folds the log in memory but for the
// events that were given up, and needs no database. The key is a stream's id, or the columns of the row's key with slashes
// between.
func (e *Engine) AsOf(ctx context.Context, model, key string, at *Moment, givenUp []Discarded) (s Snapshot, err error) {
	m, err := projections.Find(e.Models, model)
	if err != nil {
		return s, err
	}
	s = Snapshot{Model: m.Name, Key: key, Rows: []map[string]any{}}
	leftOut := map[string]bool{}
	for _, d := range givenUp {
		leftOut[d.Position] = leftOut[d.Position] || d.Model == m.Name
	}
	if err := e.asOf(ctx, m, at, leftOut, &s); err != nil {
		return s, fmt.Errorf("fold %s of %s: %w", key, m.Name, err)
	}
	return s, nil
}

// began is when a row came to be.
type began struct {
	key any
	at  time.Time
}

func (e *Engine) asOf(ctx context.Context, m projections.Model, at *Moment, leftOut map[string]bool, s *Snapshot) error {
	partitions, err := e.partitionsOf(m, s.Key)
	if err != nil {
		return err
	}
	if at != nil {
		if err := e.resolve(ctx, at); err != nil {
			return err
		}
	}
	t := &task{model: m}
	matches := matcher(m, s.Key)
	rows := map[any]any{}
	var order []began
	for _, p := range partitions {
		for _, topic := range m.Topics {
			end, err := e.Source(topic).End(ctx, p)
			if err != nil {
				return err
			}
			last := int64(0)
			err = read(ctx, e.Source(topic), topic, p, 0, end, func(r domain.Recorded) error {
				process, err := journal.Next(last, r)
				if err != nil || !process {
					return err
				}
				last = r.Seq
				if at != nil && !at.covers(r) || len(leftOut) > 0 && leftOut[r.Position.String()] {
					return nil
				}
				event, listens, bad := m.Decode(r)
				if !listens {
					return nil
				}
				if bad != nil && event.Fact == nil {
					if r.Stream == s.Key {
						return fmt.Errorf("event %s: %w; --as-of a position before it tells of what came before", r.Position, bad)
					}
					return nil
				}
				keys, err := t.keysOf(&arrival{Event: event})
				if err != nil {
					return fmt.Errorf("event %s: %w", r.Position, err)
				}
				touched := false
				for _, key := range keys {
					if !matches(key) {
						continue
					}
					if rows[key] == nil {
						rows[key] = m.New()
						order = append(order, began{key, r.Time})
					}
					if err := t.apply(key, rows[key], event); err != nil {
						return fmt.Errorf("event %s: %w", r.Position, err)
					}
					touched = true
				}
				if touched {
					s.Events++
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	// What was recorded at one time stays in the order in which it was read, which is that of its partition.
	slices.SortStableFunc(order, func(a, b began) int { return a.at.Compare(b.at) })
	for _, b := range order {
		values, err := m.Values(b.key, rows[b.key])
		if err != nil {
			return err
		}
		row := map[string]any{}
		for i, c := range m.Columns {
			switch v := values[i].(type) {
			case [16]byte:
				row[c.Name] = uuid.UUID(v)
			case string:
				row[c.Name] = v
				if c.Type == "json" {
					row[c.Name] = json.RawMessage(v)
				}
			default:
				row[c.Name] = v
			}
		}
		s.Rows = append(s.Rows, row)
	}
	if len(s.Rows) == 0 && at == nil {
		return errors.New("there is no such row")
	}
	if len(s.Rows) == 0 {
		return ErrNoRow
	}
	return nil
}

// Part is which part of what has happened a scratch build is made of. A zero Part is all of it.
type Part struct {
	From  *Moment // what had not happened before it
	Until *Moment // what had happened at it
	Key   string  // the rows of one key
}

// Inspect makes a build of a part of what has happened, for people to look at; it is kept for Config.Keep. The progress
// of the last phase names its table.
func (e *Engine) Inspect(ctx context.Context, model string, part Part, progress func(Progress)) error {
	m, err := projections.Find(e.Models, model)
	if err != nil {
		return err
	}
	if err := e.inspect(ctx, m, part, progress); err != nil {
		return fmt.Errorf("build a part of %s: %w", m.Name, err)
	}
	return nil
}

func (e *Engine) inspect(ctx context.Context, m projections.Model, part Part, progress func(Progress)) (err error) {
	for _, moment := range []*Moment{part.From, part.Until} {
		if moment != nil {
			if err := e.resolve(ctx, moment); err != nil {
				return err
			}
		}
	}
	if part.From != nil && part.Until != nil && part.Until.Before(*part.From) {
		return fmt.Errorf("there is nothing between: %s was recorded before %s", part.Until, part.From)
	}
	var wanted func(key any) bool
	if part.Key != "" {
		if _, err := e.partitionsOf(m, part.Key); err != nil {
			return err
		}
		wanted = matcher(m, part.Key)
	}
	r, end, err := e.begin(ctx, m, progress, forLooking)
	if err != nil {
		return err
	}
	defer end(&err)
	for _, t := range r.tasks {
		t.listens = func(e projections.Event) bool {
			return (part.From == nil || !part.From.covers(e.Recorded) || part.From.Position == e.Position) &&
				(part.Until == nil || part.Until.covers(e.Recorded))
		}
		t.wanted = wanted
	}
	r.lost = true
	old, found, err := buildIn(ctx, r.conn, role{m.Name, live})
	if err != nil {
		return err
	}
	if found {
		if err := e.ofThisLog(old); err != nil { // which may be what is to be looked at
			e.Logger.Warn("the part is of another log than the live build", "model", m.Name, "err", err)
		}
	}
	if err := r.fill(ctx); err != nil {
		return err
	}
	var rows, parked int64
	var keys []string // of the events that the part should have; nil for all
	if part.Key != "" && m.Stream != "" {
		keys = append(keys, short(part.Key))
		if key, err := m.ParseKey(part.Key); err == nil {
			keys = append(keys, short(streamOf(m, key)))
		}
	}
	err = r.conn.QueryRow(ctx, "SELECT (SELECT count(*) FROM "+r.build.table()+`),
		(SELECT count(*) FROM wharf.parked WHERE build = $1 AND ($2::text[] IS NULL OR keys && $2))`, r.build.id, keys).Scan(&rows, &parked)
	if err != nil {
		return err
	}
	if rows == 0 && parked == 0 && part.Key != "" {
		return ErrNoRow
	}
	if err := r.keepAside(ctx); err != nil {
		return err
	}
	r.report.Table, r.report.Rows, r.report.Parked = r.build.table(), rows, parked
	r.tell(PhaseDone)
	return nil
}
