package projections

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/sync/errgroup"
)

// Lags is what only Kafka knows of how far everybody is.
type Lags interface {
	// TopicIDs is the id of each topic, as far as they are known.
	TopicIDs() map[string]string
	// Ends is the end offset of every partition of the topics.
	Ends(ctx context.Context, topics []string) (map[string]map[int32]int64, error)
	// Oldest is the time of the first record of the partition from the offset on; false if there is none.
	Oldest(ctx context.Context, topic string, partition int32, offset int64) (time.Time, bool, error)
	// Policies is how far each service's policies are behind, in records.
	Policies(ctx context.Context) ([]PolicyLag, error)
}

// PolicyLag is how far a service's policies are behind, in records of the topics that they follow.
type PolicyLag struct {
	Service string `json:"service"`
	Lag     int64  `json:"lag" doc:"Events not yet acted upon."`

	Parked []ParkedPolicy `json:"parked,omitempty" doc:"Events that are tried again and again; some, if there are many."`
}

// ParkedPolicy is an event whose command cannot be decided, so that the stream which it is for waits. It is not lost: it is
// tried again until it can be.
type ParkedPolicy struct {
	Position string `json:"position" doc:"Of the event; of the last one before a gap."`
	Stream   string `json:"stream" doc:"That waits: the one the command is for, or the event's own if the partition is halted."`
	Halted   string `json:"halted,omitempty" doc:"Why the whole source partition is halted there."`
}

// State is what a build is good for.
type State string

// The states of a build. Halted is a live one that has come upon an error which only people can mend.
const (
	StateBuilding State = "building"
	StateLive     State = "live"
	StateHalted   State = "halted"
)

// BuildStatus is one build of a read model.
type BuildStatus struct {
	Name     string           `json:"name"`
	Build    int64            `json:"build" doc:"Counts up with every build of any read model."`
	Version  int              `json:"version" doc:"Of the read model's definition."`
	State    State            `json:"state" enum:"building,live,halted" doc:"Queries read the live one, also when it is halted."`
	Position map[string]int64 `json:"position" doc:"How many events of each topic it has seen, in all partitions together."`
	Lag      int64            `json:"lag" doc:"Events it has not seen yet."`

	LagSeconds float64 `json:"lag_seconds" doc:"How old the oldest event is that it has not seen, where it lags the most; 0 if there is none."`
	Rate       float64 `json:"rate" doc:"Events a second, lately."`
	Parked     int64   `json:"parked" doc:"Events that could not be applied, and that wait for one of those."`
	Skipped    int64   `json:"skipped,omitempty" doc:"Records that nobody could read, and that were left out."`
	Error      string  `json:"error,omitempty" doc:"Why it is halted, by partition."`
	LastError  string  `json:"last_error,omitempty" doc:"What went wrong last, and passed; with the time."`

	Verified *Verified      `json:"verified,omitempty" doc:"What the last verification of this build found, if there was one; a replay whose rows are those of the build before is one."`
	Previous *PreviousBuild `json:"previous,omitempty" doc:"The build that was live before, as long as a rollback to it is possible."`

	keepUntil *time.Time
	gone      bool   // its view
	halted    string // why, in the last of the partitions of Error
}

// isLive says that queries read the build, halted or not.
func (b *BuildStatus) isLive() bool { return b.State == StateLive || b.State == StateHalted }

// Verified is what a comparison of a build's rows with the fold of the log has found.
type Verified struct {
	At          time.Time `json:"at"`
	Differences int64     `json:"differences" doc:"Rows that were not the same."`
}

// ScratchBuild is a build for people to look at.
type ScratchBuild struct {
	Name      string    `json:"name"`
	Build     int64     `json:"build"`
	Version   int       `json:"version"`
	KeepUntil time.Time `json:"keep_until" doc:"When it is dropped."`
}

// PreviousBuild is the build that was live before: it is kept up to date until it is dropped.
type PreviousBuild struct {
	Build     int64     `json:"build"`
	Version   int       `json:"version"`
	Lag       int64     `json:"lag"`
	Parked    int64     `json:"parked" doc:"Events that are missing from its rows."`
	KeepUntil time.Time `json:"keep_until"`
}

// Status is how far everything is that runs behind the commands. When no policy has a lag, no live build has one and no
// intent is open, the shop is at rest.
type Status struct {
	Items       []BuildStatus  `json:"items" doc:"Every build that queries read or that is being made."`
	Scratch     []ScratchBuild `json:"scratch,omitempty" doc:"Builds for people to look at, which nothing keeps up to date."`
	Policies    []PolicyLag    `json:"policies"`
	OpenIntents int64          `json:"open_intents" doc:"Requests to the payment provider without an answer."`
}

// ReadStatus asks the views and Kafka how far everything is. What is behind is never taken for up to date: ends are
// asked for after the positions.
func ReadStatus(ctx context.Context, db DB, lags Lags) (Status, error) {
	s := Status{Items: []BuildStatus{}, Policies: []PolicyLag{}}
	places, err := s.readBuilds(ctx, db, lags.TopicIDs())
	if err != nil {
		return s, fmt.Errorf("read the builds: %w", err)
	}
	// Where payments cannot be read, its item says why.
	readable := func(b BuildStatus) bool { return b.Name == Payments.Name && b.isLive() && !b.gone }
	if slices.ContainsFunc(s.Items, readable) {
		row := db.QueryRow(ctx, "SELECT coalesce(sum(open_intents), 0)::bigint FROM wharf_read.payments")
		if err := row.Scan(&s.OpenIntents); err != nil {
			return s, fmt.Errorf("count the open intents: %w", err)
		}
	}
	var ends map[string]map[int32]int64
	g, asking := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if ends, err = lags.Ends(asking, Topics); err != nil {
			return fmt.Errorf("find the ends of the topics: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		policies, err := lags.Policies(asking)
		if err != nil {
			return fmt.Errorf("find the lag of the policies: %w", err)
		}
		s.Policies = append(s.Policies, policies...)
		return nil
	})
	if err := g.Wait(); err != nil {
		return s, err
	}
	s.measure(ctx, places, ends, lags)
	s.setAside()
	return s, nil
}

// Builds in these states are shown elsewhere than among the items.
const (
	statePrevious = "previous"
	stateScratch  = "scratch"
)

// setAside makes the previous builds part of the live ones' items, and lists those for people to look at apart.
func (s *Status) setAside() {
	for _, b := range s.Items {
		if b.State == stateScratch {
			s.Scratch = append(s.Scratch, ScratchBuild{b.Name, b.Build, b.Version, b.keepUntil.UTC()})
		}
		for i := range s.Items {
			if live := &s.Items[i]; b.State == statePrevious && live.Name == b.Name && live.isLive() {
				live.Previous = &PreviousBuild{b.Build, b.Version, b.Lag, b.Parked, b.keepUntil.UTC()}
			}
		}
	}
	s.Items = slices.DeleteFunc(s.Items, func(b BuildStatus) bool { return b.State == statePrevious || b.State == stateScratch })
}

// place is where a build is in a partition.
type place struct {
	topic     string
	partition int32
	offset    int64
}

// How old events are is worth a look at a few of the places that lag the most, and no more than a moment.
const (
	placesLooked = 3
	lookFor      = time.Second
)

// measure fills in how far each item is behind, given where it is and where the topics end. How old what it has not seen is
// takes a look into the log, which is left out where it takes too long.
func (s *Status) measure(ctx context.Context, places [][]place, ends map[string]map[int32]int64, lags Lags) {
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	lagOf := func(p place) int64 { return max(0, ends[p.topic][p.partition]-p.offset) }
	oldest := make([][]time.Time, len(places))
	var looking sync.WaitGroup
	for i, ps := range places {
		for _, p := range ps {
			s.Items[i].Lag += lagOf(p)
		}
		s.Items[i].countMissing(ps, ends)
		if !s.Items[i].isLive() {
			continue
		}
		behind := slices.SortedFunc(slices.Values(ps), func(a, b place) int { return cmp.Compare(lagOf(b), lagOf(a)) })
		behind = behind[:min(len(behind), placesLooked)]
		oldest[i] = make([]time.Time, len(behind))
		for n, p := range behind {
			if lagOf(p) > 0 {
				looking.Go(func() {
					if at, found, err := lags.Oldest(ctx, p.topic, p.partition, p.offset); err == nil && found {
						oldest[i][n] = at
					}
				})
			}
		}
	}
	looking.Wait()
	now := time.Now()
	for i := range places {
		for _, at := range oldest[i] {
			if !at.IsZero() {
				s.Items[i].LagSeconds = max(s.Items[i].LagSeconds, math.Round(now.Sub(at).Seconds()*1000)/1000)
			}
		}
	}
}

// countMissing says which of the partitions the build has no place in, which only somebody who deletes it can bring about: all
// that is in them is missing.
func (b *BuildStatus) countMissing(ps []place, ends map[string]map[int32]int64) {
	missing := map[int32]bool{}
	for topic := range b.Position {
		for partition, end := range ends[topic] {
			if !slices.ContainsFunc(ps, func(p place) bool { return p.topic == topic && p.partition == partition }) {
				missing[partition] = true
				b.Lag += end
			}
		}
	}
	for _, partition := range slices.Sorted(maps.Keys(missing)) {
		b.halt(partition, "its row of wharf.tasks is gone: build the read model anew (wharf replay --force)")
	}
}

// halt says why the build does not go on in the partition, once if it is the same as in the one before.
func (b *BuildStatus) halt(partition int32, why string) {
	switch {
	case b.halted == why:
		b.Error = fmt.Sprintf("%s, %d: %s", strings.TrimSuffix(b.Error, ": "+why), partition, why)
	case b.Error != "":
		b.Error += fmt.Sprintf("; partition %d: %s", partition, why)
	default:
		b.Error = fmt.Sprintf("partition %d: %s", partition, why)
	}
	b.halted = why
	if b.State == StateLive {
		b.State = StateHalted
	}
}

// IsAnother says that a topic is another one than it was, by what is known of its ids.
func IsAnother(was, is string) bool { return was != "" && is != "" && was != is }

// readBuilds fills in the items but for their lag, and says where each is in each partition: at the start of a topic that is another
// one than the build was made of.
func (s *Status) readBuilds(ctx context.Context, db DB, ids map[string]string) (places [][]place, err error) {
	// The view of a projector that is older than this program lacks what goes by JSON.
	rows, err := db.Query(ctx, `SELECT id, model, version, state, topics, partition, offsets, seqs, skipped, error, trouble,
			rate, parked, keep_until, (to_jsonb(b)->>'verified_at')::timestamptz, (to_jsonb(b)->>'differences')::bigint,
			state = 'live' AND to_regclass($1 || '.' || quote_ident(model)) IS NULL,
			ARRAY(SELECT jsonb_array_elements_text(to_jsonb(b)->'topic_ids'))
		FROM wharf_read.builds b WHERE state = 'scratch' OR purpose = 'replay' ORDER BY model, id, partition`, ViewSchema)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var b BuildStatus
		var topics, topicIDs []string
		var partition int32
		var offsets, seqs []int64
		var verified *time.Time
		var differences *int64
		err := rows.Scan(&b.Build, &b.Name, &b.Version, &b.State, &topics, &partition, &offsets, &seqs,
			&b.Skipped, &b.Error, &b.LastError, &b.Rate, &b.Parked, &b.keepUntil,
			&verified, &differences, &b.gone, &topicIDs)
		if err != nil {
			return nil, err
		}
		if len(offsets) != len(topics) || len(seqs) != len(topics) {
			return nil, errors.New("a task has not one position per topic")
		}
		last := len(s.Items) - 1
		if last < 0 || s.Items[last].Build != b.Build {
			last++
			s.Items = append(s.Items, BuildStatus{Name: b.Name, Build: b.Build, Version: b.Version, State: b.State,
				Position: map[string]int64{}, keepUntil: b.keepUntil, gone: b.gone})
			if b.gone {
				s.Items[last].State = StateHalted
				s.Items[last].Error = "its table or its view is gone: build the read model anew (wharf replay; if it is the table, with --force)"
			}
			if differences != nil {
				s.Items[last].Verified = &Verified{verified.UTC(), *differences}
			}
			places = append(places, nil)
		}
		item := &s.Items[last]
		item.Skipped += b.Skipped
		item.Parked += b.Parked
		item.Rate = math.Round((item.Rate+b.Rate)*10) / 10
		item.LastError = max(item.LastError, b.LastError) // which begins with its time
		if b.Error != "" {
			item.halt(partition, b.Error)
		}
		var others []string
		for i, topic := range topics {
			if i < len(topicIDs) && IsAnother(topicIDs[i], ids[topic]) {
				offsets[i], seqs[i] = 0, 0
				others = append(others, topic)
			}
			item.Position[topic] += seqs[i]
			places[last] = append(places[last], place{topic, partition, offsets[i]})
		}
		if len(others) > 0 {
			item.halt(partition, fmt.Sprintf("the build was made of another topic %s than there is now (wharf verify %s says more)",
				strings.Join(others, " and "), b.Name))
		}
	}
	for _, m := range All {
		live := func(b BuildStatus) bool { return b.Name == m.Name && b.isLive() }
		if rows.Err() == nil && !slices.ContainsFunc(s.Items, live) {
			s.Items = append(s.Items, BuildStatus{Name: m.Name, Version: m.Version, State: StateHalted, Position: map[string]int64{}, gone: true,
				Error: "there is no live build, or its rows of wharf.tasks are gone: start a projector anew, or build it anew (wharf replay --force)"})
			places = append(places, nil)
		}
	}
	return places, rows.Err()
}

// Ready is nil when every read model can be queried.
func Ready(ctx context.Context, db DB) error {
	rows, err := db.Query(ctx, "SELECT DISTINCT model FROM wharf_read.builds WHERE state = 'live'")
	var live []string
	for err == nil && rows.Next() {
		var model string
		err = rows.Scan(&model)
		live = append(live, model)
	}
	if err == nil {
		rows.Close()
		err = rows.Err()
	}
	if err != nil {
		return fmt.Errorf("find the read models: %w", err)
	}
	for _, m := range All {
		if !slices.Contains(live, m.Name) {
			return fmt.Errorf("the read model %s has not been built yet", m.Name)
		}
	}
	return nil
}

type statusAnswer struct {
	ETag string `header:"ETag"`
	Body Status
}

func registerStatus(api huma.API, r Reads) {
	huma.Register(api, huma.Operation{
		OperationID: "get-projections", Method: http.MethodGet, Path: "/projections",
		Summary: "How far read models and policies are", Tags: []string{"operation"},
	}, func(ctx context.Context, _ *struct{}) (*statusAnswer, error) {
		s, err := ReadStatus(ctx, r.DB, r.Lags)
		if err != nil {
			return nil, err
		}
		return &statusAnswer{etag(0), s}, nil
	})
}
