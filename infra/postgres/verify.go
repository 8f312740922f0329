package postgres

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"wharf/projections"
)

var (
	verifiedAt = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Name: "wharf_projection_verified_timestamp_seconds",
		Help: "When the live build of the read model was last compared with the fold of the log, if it ever was.",
	}, []string{"model"})
	differences = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Name: "wharf_projection_differences",
		Help: "Rows of the live build that differed from the fold of the log when it was last verified, and events that could not be applied then.",
	}, []string{"model"})
)

// showVerified has the metrics say what whoever verified the live build last has found, if somebody has.
func (b build) showVerified() {
	if b.differences == nil {
		verifiedAt.DeleteLabelValues(b.model)
		differences.DeleteLabelValues(b.model)
		return
	}
	verifiedAt.WithLabelValues(b.model).Set(float64(b.verified.UnixMilli()) / 1000)
	differences.WithLabelValues(b.model).Set(float64(*b.differences))
}

// Comparison is what became of comparing the live build of a read model, row by row, with another one that was folded
// from the start of the log to the same position.
type Comparison struct {
	Model    string           `json:"model"`
	Build    int64            `json:"build"` // the live one
	Version  int              `json:"version"`
	Rows     int64            `json:"rows"`     // of the fold
	Events   int64            `json:"events"`   // that the log held up to there, of the topics that it listens to
	Position map[string]int64 `json:"position"` // events of each topic, in all partitions together
	Hash     string           `json:"hash"`     // of the fold's rows, in whatever order

	OnlyLive  int64        `json:"only_live"` // rows that the log does not tell of
	OnlyFold  int64        `json:"only_fold"` // rows that are missing
	Differing int64        `json:"differing"`
	First     []Difference `json:"first"`            // a few of them, by key
	Halted    string       `json:"halted,omitempty"` // why the live build does not go on, if it does not
	Parked    int64        `json:"parked"`           // events that wait in the live build; rows that are stale are not compared
	Discarded int64        `json:"discarded"`        // events that an operator gave up
	Unapplied int64        `json:"unapplied"`        // events that the live build has applied, and this program could not
	Unread    string       `json:"unread,omitempty"` // why queries do not read the live build, if they do not
}

// Difference is a row that is not the same in both builds.
type Difference struct {
	Key     string            `json:"key"`
	Kind    string            `json:"kind"`              // only_live, only_fold or differing
	Columns []string          `json:"columns,omitempty"` // that differ
	Live    map[string]string `json:"live,omitempty"`    // the text of each of them, where it begins to differ
	Fold    map[string]string `json:"fold,omitempty"`
}

func (d Difference) String() string {
	text := d.Key + ": " + strings.ReplaceAll(d.Kind, "_", " ")
	for i, c := range d.Columns {
		separator := ","
		if i == 0 {
			separator = ":"
		}
		text += separator + fmt.Sprintf(" %s is %q in the live build and %q in the fold", c, d.Live[c], d.Fold[c])
	}
	return text
}

// What a Difference shows of a column's text: so many characters, from a few before the first one that differs.
const (
	shownText   = 100
	shownBefore = 20
)

func excerpts(a, b string) (string, string) {
	from, to := []rune(a), []rune(b)
	same := 0
	for same < min(len(from), len(to)) && from[same] == to[same] {
		same++
	}
	cut := func(text []rune) string {
		begin, prefix, suffix := max(0, same-shownBefore), "", ""
		if begin > 0 {
			prefix = "…"
		}
		end := min(len(text), begin+shownText)
		if end < len(text) {
			suffix = "…"
		}
		return prefix + string(text[begin:end]) + suffix
	}
	return cut(from), cut(to)
}

// Differences is how many rows are not the same in both.
func (c *Comparison) Differences() int64 { return c.OnlyLive + c.OnlyFold + c.Differing }

// Same says that the live rows are what this program makes of the log.
func (c *Comparison) Same() bool { return c.Differences() == 0 && c.Unapplied == 0 }

// String says it in a line, and a line for each of the first differences.
func (c *Comparison) String() string {
	var seen []string
	for _, topic := range slices.Sorted(maps.Keys(c.Position)) {
		seen = append(seen, fmt.Sprintf("%s %d", topic, c.Position[topic]))
	}
	text := fmt.Sprintf("%s: build %d; the fold of %d events (%s) has %d rows, hash %s", c.Model, c.Build, c.Events,
		strings.Join(seen, ", "), c.Rows, c.Hash)
	if c.Discarded > 0 {
		text += fmt.Sprintf("; %d events were given up, and are in neither", c.Discarded)
	}
	if c.Parked > 0 {
		text += fmt.Sprintf("; %d events are parked, and the rows that wait for them were not compared", c.Parked)
	}
	if c.Halted != "" {
		text += "; the live build has halted there: " + c.Halted
	}
	if c.Unapplied > 0 {
		text += fmt.Sprintf("; %d events that the live build has applied cannot be applied by this program, or wait for one that cannot", c.Unapplied)
	}
	unread := ""
	if c.Unread != "" {
		unread = "; but queries do not read them: " + c.Unread
	}
	if c.Same() {
		return text + ": the live rows equal the fold of the log" + unread
	}
	text += fmt.Sprintf(": rows that differ: %d (only in the live build: %d, only in the fold: %d, in both but not the same: %d)",
		c.Differences(), c.OnlyLive, c.OnlyFold, c.Differing) + unread
	for _, d := range c.First {
		text += "\n  " + d.String()
	}
	if len(c.First) > 0 && int64(len(c.First)) < c.Differences() {
		text += "\n  …"
	}
	return text
}

// DifferenceError says that a new build is not what the live one is.
type DifferenceError struct{ Comparison Comparison }

func (e *DifferenceError) Error() string {
	return "the new build differs from the live one, and was not swapped in. Either the live rows are wrong, or Apply was " +
		"changed without raising the version; --force swaps it in all the same.\n" + e.Comparison.String()
}

// firstDifferences is how many keys a Comparison names.
const firstDifferences = 10

// Verify compares the live build of each named read model with a fold of the log from its start to the same position,
// and tells each result; the error says which could not be compared, and why. Live projection goes on, but for the moment in which both are brought to one position. The fold
// is a build of its own in the database, which is dropped after that, so memory is bounded whatever the log's length.
func (e *Engine) Verify(ctx context.Context, names []string, progress func(Progress), result func(Comparison)) error {
	models, err := e.models(names)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range models {
		c, err := e.verify(ctx, m, 0, progress)
		if err == nil {
			result(c)
			continue
		}
		errs = append(errs, fmt.Errorf("verify %s: %w", m.Name, err))
		if ctx.Err() != nil || !e.Answers(ctx) { // or else what is wrong with one is not wrong with the others
			break
		}
	}
	return errors.Join(errs...)
}

// verify is one model's; pace is how many events a second are read at most, if not 0.
func (e *Engine) verify(ctx context.Context, m projections.Model, pace int, progress func(Progress)) (c Comparison, err error) {
	b, found, err := buildIn(ctx, e.pool, role{m.Name, live})
	if err != nil {
		return c, err
	}
	if found && b.version != m.Version {
		return c, otherVersion(b.version, m)
	}
	before, err := e.givenUp(ctx, e.pool, m.Name)
	if err != nil {
		return c, err
	}
	r, end, err := e.begin(ctx, m, progress, forLooking)
	if err != nil {
		return c, err
	}
	defer end(&err)
	r.pace = pacer{rate: pace, began: time.Now()}
	if err := r.fill(ctx); err != nil {
		return c, err
	}
	c, err = r.compare(ctx)
	switch {
	case err != nil:
		return c, err
	case c.Version != m.Version: // swapped in meanwhile
		return c, otherVersion(c.Version, m)
	case c.Discarded != int64(len(before)): // which the fold does not know of
		return c, errors.New("an event was given up meanwhile: verify it again")
	}
	r.tell(PhaseDone)
	if err := r.abandon(ctx); err != nil { // the next sweep drops it
		e.Logger.Warn("the build of a verification could not be dropped", "model", m.Name, "err", err)
	}
	_, err = r.conn.Exec(ctx, verified, c.Build, c.Differences()+c.Unapplied)
	return c, err
}

// verified writes down how many differences a build was found to have.
const verified = "UPDATE wharf.builds SET verified_at = now(), differences = $2 WHERE id = $1"

// verifyNowAndThen verifies all read models again and again, one after the other, if one is to. Of several engines on
// one database one does so.
func (e *Engine) verifyNowAndThen(ctx context.Context) {
	if e.Config.Verify <= 0 {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(e.Config.Verify):
		}
		if err := e.verifyAll(ctx); err != nil && ctx.Err() == nil {
			e.Logger.Warn("read models could not be verified", "err", err)
		}
	}
}

func (e *Engine) verifyAll(ctx context.Context) error {
	conn, err := e.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	var ours bool
	if err := conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1, $2)", lockClass, verifyLock).Scan(&ours); err != nil || !ours {
		return err
	}
	defer unlock(ctx, conn, lockClass, verifyLock)
	var errs []error
	for _, m := range e.Models {
		var due bool
		err := conn.QueryRow(ctx, `SELECT coalesce(bool_and(verified_at < now() - make_interval(secs => $2)), false)
			FROM wharf.builds WHERE model = $1 AND state = 'live'`, m.Name, e.Config.Verify.Seconds()/2).Scan(&due)
		var c Comparison
		if err == nil && due { // another engine has not done it meanwhile
			c, err = e.verify(ctx, m, e.Pace, func(Progress) {})
		}
		switch {
		case err != nil:
			if !errors.Is(err, errOtherVersion) {
				errs = append(errs, fmt.Errorf("%s: %w", m.Name, err))
			}
		case !due:
		case !c.Same() || c.Unread != "":
			e.Logger.Error("a read model is not the fold of the log, or not what queries read: build it anew (wharf replay --force)",
				"model", m.Name, "difference", c.String())
		default:
			e.Logger.Info("a read model was verified", "model", m.Name, "rows", c.Rows, "events", c.Events, "hash", c.Hash)
		}
	}
	return errors.Join(errs...)
}

// pacer holds a reader back to a rate.
type pacer struct {
	rate  int
	began time.Time
	done  int64
}

// wait counts the events and sleeps as long as they were too fast.
func (p *pacer) wait(events int64) time.Duration {
	if p.rate <= 0 {
		return 0
	}
	p.done += events
	return time.Until(p.began.Add(time.Duration(float64(p.done) / float64(p.rate) * float64(time.Second))))
}

var errOtherVersion = errors.New("the live build is of another version than this program's")

func otherVersion(live int, m projections.Model) error {
	return fmt.Errorf("%w: it has %d, and this program %d", errOtherVersion, live, m.Version)
}

// compare brings the new build to where the live one is, and compares the two in a snapshot of that moment.
func (r *replay) compare(ctx context.Context) (c Comparison, err error) {
	r.tell(PhaseVerifying)
	conn, err := r.pool.Acquire(ctx)
	if err != nil {
		return c, err
	}
	defer conn.Release()
	var old build
	var snapshot pgx.Tx
	end := func() {
		if snapshot != nil {
			_ = snapshot.Rollback(context.WithoutCancel(ctx))
		}
	}
	defer func() { end() }()
	err = r.meet(ctx, func(_ pgx.Tx, b build) (err error) {
		end() // of a try before
		old = b
		if snapshot, err = conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}); err != nil {
			return err
		}
		// The first statement takes the snapshot, while both are at one position.
		_, err = snapshot.Exec(ctx, "SELECT count(*) FROM wharf.builds")
		return err
	})
	if err != nil {
		return c, err
	}
	return r.e.compare(ctx, snapshot, r.model, old, r.build)
}

// compare compares two builds of the model in one snapshot.
func (e *Engine) compare(ctx context.Context, tx pgx.Tx, m projections.Model, old, fresh build) (c Comparison, err error) {
	c = Comparison{Model: m.Name, Build: old.id, Version: old.version, Position: map[string]int64{}, First: []Difference{}}
	// Text is compared and shown the same everywhere, there is no limit to how long it may take, and other processors are left
	// to queries.
	if _, err := tx.Exec(ctx, `SET LOCAL TimeZone = 'UTC'; SET LOCAL statement_timeout = 0; SET LOCAL work_mem = '64MB';
		SET LOCAL max_parallel_workers_per_gather = 0`); err != nil {
		return c, err
	}
	rows, err := tx.Query(ctx, `SELECT topic, sum(seq)::bigint FROM wharf.tasks, unnest($2::text[], seqs) AS s (topic, seq)
		WHERE build = $1 GROUP BY topic`, fresh.id, fresh.topics)
	if err != nil {
		return c, err
	}
	var topic string
	var seq int64
	if _, err := pgx.ForEachRow(rows, []any{&topic, &seq}, func() error {
		c.Position[topic] = seq
		c.Events += seq
		return nil
	}); err != nil {
		return c, err
	}
	err = tx.QueryRow(ctx, `SELECT (SELECT count(*) FROM wharf.parked WHERE build = $1),
		coalesce((SELECT string_agg(format('partition %s: %s', partition, error), '; ' ORDER BY partition) FROM wharf.tasks
			WHERE build = $1 AND error <> ''), ''),
		(SELECT count(*) FROM wharf.parked f WHERE build = $2 AND NOT EXISTS (SELECT FROM wharf.parked l
			WHERE l.build = $1 AND l.partition = f.partition AND l.topic = f.topic AND l.seq = f.seq))`,
		old.id, fresh.id).Scan(&c.Parked, &c.Halted, &c.Unapplied)
	if err != nil {
		return c, err
	}
	givenUp, err := e.givenUp(ctx, tx, m.Name)
	if err != nil {
		return c, err
	}
	c.Discarded = int64(len(givenUp))
	values := make([]string, len(m.Columns))
	for i, column := range m.Columns {
		values[i] = compared("r", column)
	}
	hash := fmt.Sprintf(`SELECT count(*), lpad(to_hex(coalesce(bit_xor(hash_record_extended(ROW(%s), 0)), 0)), 16, '0') FROM %s r`,
		strings.Join(values, ", "), fresh.table())
	if err := tx.QueryRow(ctx, hash).Scan(&c.Rows, &c.Hash); err != nil {
		return c, err
	}
	there, err := old.hasTable(ctx, tx)
	if err != nil {
		return c, err
	}
	if !there {
		c.OnlyFold, c.Unread = c.Rows, "somebody has dropped its table"
		return c, nil
	}
	// One that was swapped out meanwhile is not read, which is right. (to_regclass would not look into the snapshot.)
	var unread bool
	err = tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM wharf.builds WHERE id = $1 AND state = 'live') AND NOT EXISTS (
		SELECT FROM pg_class v JOIN pg_namespace n ON n.oid = v.relnamespace JOIN pg_rewrite r ON r.ev_class = v.oid
			JOIN pg_depend d ON d.objid = r.oid JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace s ON s.oid = t.relnamespace
		WHERE n.nspname = $2 AND v.relname = $3 AND s.nspname = $4 AND t.relname = $3)`,
		old.id, projections.ViewSchema, m.Name, old.schema()).Scan(&unread)
	if err != nil {
		return c, err
	}
	if unread {
		c.Unread = "somebody has dropped the view " + viewOf(m.Name) + ", or made it anew; a replay mends it"
	}
	// Columns that only one of them has (of another version) are not compared.
	shared, err := sharedColumns(ctx, tx, m, old, fresh)
	if err != nil {
		return c, err
	}
	key := m.Columns[:m.Keys]
	if len(shared) < len(key) || !slices.Equal(shared[:len(key)], key) {
		c.OnlyFold = c.Rows // another key: no row is in both
		return c, tx.QueryRow(ctx, "SELECT count(*) FROM "+old.table()).Scan(&c.OnlyLive)
	}
	var equal, which []string
	for _, column := range shared[len(key):] {
		same := compared("l", column) + " IS NOT DISTINCT FROM " + compared("f", column)
		equal = append(equal, same)
		which = append(which, fmt.Sprintf("CASE WHEN %s THEN NULL ELSE json_build_array('%s', l.%[3]s::text, f.%[3]s::text) END", same, column.Name, quote(column.Name)))
	}
	equal, which = append(equal, "true"), append(which, "NULL")
	joined := fmt.Sprintf(`FROM (SELECT *, true AS is_there FROM %s) l FULL JOIN (SELECT *, true AS is_there FROM %s) f USING (%s)
		WHERE (l.is_there IS NULL OR f.is_there IS NULL OR NOT (%s))`,
		old.table(), fresh.table(), columnNames(key), strings.Join(equal, " AND "))
	joined += " AND NOT " + waiting(m, old)
	kind := "CASE WHEN f.is_there IS NULL THEN 'only_live' WHEN l.is_there IS NULL THEN 'only_fold' ELSE 'differing' END"
	texts := make([]string, len(key))
	for i, k := range key {
		texts[i] = quote(k.Name) + "::text"
	}
	// What differs is an array of name, live and fold a column.
	found, err := tx.Query(ctx, fmt.Sprintf(`SELECT concat_ws('/', %s), %s, CASE WHEN l.is_there AND f.is_there THEN
		(SELECT coalesce(json_agg(x), '[]') FROM (VALUES (%s)) AS v (x) WHERE x IS NOT NULL) ELSE '[]' END %s ORDER BY %s LIMIT %d`,
		strings.Join(texts, ", "), kind, strings.Join(which, "), ("), joined, columnNames(key), firstDifferences))
	if err != nil {
		return c, err
	}
	var d Difference
	var differing [][3]string
	_, err = pgx.ForEachRow(found, []any{&d.Key, &d.Kind, &differing}, func() error {
		d.Columns, d.Live, d.Fold = nil, map[string]string{}, map[string]string{}
		for _, column := range differing {
			name := column[0]
			d.Columns = append(d.Columns, name)
			d.Live[name], d.Fold[name] = excerpts(column[1], column[2])
		}
		c.First = append(c.First, d)
		return nil
	})
	if err != nil || len(c.First) == 0 {
		return c, err
	}
	err = tx.QueryRow(ctx, fmt.Sprintf(`SELECT count(*) FILTER (WHERE kind = 'only_live'), count(*) FILTER (WHERE kind = 'only_fold'),
		count(*) FILTER (WHERE kind = 'differing') FROM (SELECT %s AS kind %s) d`, kind, joined)).
		Scan(&c.OnlyLive, &c.OnlyFold, &c.Differing)
	return c, err
}

// compared is a column as it can be compared and hashed.
func compared(table string, c projections.Column) string {
	value := table + "." + quote(c.Name)
	if c.Type == "json" {
		value += "::text" // which is how it was written
	}
	return value
}

// waiting is the condition that a row of the join waits for an event that is parked in the live build.
func waiting(m projections.Model, old build) string {
	waits := "k.partition = coalesce(l.partition, f.partition)"
	if m.Stream != "" {
		waits = "k.keys @> ARRAY[" + shortSQL(fmt.Sprintf("coalesce(l.%[1]s, f.%[1]s)::text", quote(m.Stream))) + "]"
	}
	return fmt.Sprintf("EXISTS (SELECT FROM wharf.parked k WHERE k.build = %d AND %s)", old.id, waits)
}

// sharedColumns are the model's columns that both builds have, in the same type.
func sharedColumns(ctx context.Context, tx pgx.Tx, m projections.Model, old, fresh build) (shared []projections.Column, err error) {
	rows, err := tx.Query(ctx, `SELECT o.attname FROM pg_attribute o JOIN pg_attribute n USING (attname, atttypid)
		WHERE o.attrelid = $1::regclass AND n.attrelid = $2::regclass AND o.attnum > 0 AND NOT o.attisdropped`,
		old.table(), fresh.table())
	if err != nil {
		return nil, err
	}
	have, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	for _, c := range m.Columns {
		if slices.Contains(have, c.Name) {
			shared = append(shared, c)
		}
	}
	return shared, nil
}
