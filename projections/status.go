package projections

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/sync/errgroup"
)

// Lags is what only Kafka knows of how far everybody is.
type Lags interface {
	// Ends is the end offset of every partition of the topics.
	Ends(ctx context.Context, topics []string) (map[string]map[int32]int64, error)
	// Policies is how far each service's policies are behind, in records.
	Policies(ctx context.Context) ([]PolicyLag, error)
}

// PolicyLag is how far a service's policies are behind, in records of the topics that they follow.
type PolicyLag struct {
	Service string `json:"service"`
	Lag     int64  `json:"lag" doc:"Events not yet acted upon."`
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
	State    State            `json:"state" enum:"building,live,halted"`
	Position map[string]int64 `json:"position" doc:"How many events of each topic it has seen, in all partitions together."`
	Lag      int64            `json:"lag" doc:"Events it has not seen yet."`
	Skipped  int64            `json:"skipped,omitempty" doc:"Records that it could not read and left out."`
	Error    string           `json:"error,omitempty" doc:"Why it is halted."`
}

// Status is how far everything is that runs behind the commands. When no policy has a lag, no live build has one and no
// intent is open, the shop is at rest.
type Status struct {
	Items       []BuildStatus `json:"items" doc:"Every build that queries read or that is being made."`
	Policies    []PolicyLag   `json:"policies"`
	OpenIntents int64         `json:"open_intents" doc:"Requests to the payment provider without an answer."`
}

// ReadStatus asks the views and Kafka how far everything is. What is behind is never taken for up to date: ends are
// asked for after the positions.
func ReadStatus(ctx context.Context, db DB, lags Lags) (Status, error) {
	s := Status{Items: []BuildStatus{}, Policies: []PolicyLag{}}
	behind, err := s.readBuilds(ctx, db)
	if err != nil {
		return s, fmt.Errorf("read the builds: %w", err)
	}
	row := db.QueryRow(ctx, "SELECT coalesce(sum(open_intents), 0)::bigint FROM wharf_read.payments")
	if err := row.Scan(&s.OpenIntents); err != nil {
		return s, fmt.Errorf("count the open intents: %w", err)
	}
	var ends map[string]map[int32]int64
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if ends, err = lags.Ends(ctx, Topics); err != nil {
			return fmt.Errorf("find the ends of the topics: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		policies, err := lags.Policies(ctx)
		if err != nil {
			return fmt.Errorf("find the lag of the policies: %w", err)
		}
		s.Policies = append(s.Policies, policies...)
		return nil
	})
	if err := g.Wait(); err != nil {
		return s, err
	}
	for i := range s.Items {
		s.Items[i].Lag = behind[i](ends)
	}
	return s, nil
}

// readBuilds fills in the items but for their lag; for each it returns a function that tells it, given the ends.
func (s *Status) readBuilds(ctx context.Context, db DB) (behind []func(map[string]map[int32]int64) int64, err error) {
	rows, err := db.Query(ctx, `SELECT id, model, version, state, topics, partition, offsets, seqs, skipped, error
		FROM wharf_read.builds ORDER BY model, id, partition`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	type place struct {
		topic     string
		partition int32
		offset    int64
	}
	var places [][]place
	for rows.Next() {
		var b BuildStatus
		var topics []string
		var partition int32
		var offsets, seqs []int64
		err := rows.Scan(&b.Build, &b.Name, &b.Version, &b.State, &topics, &partition, &offsets, &seqs,
			&b.Skipped, &b.Error)
		if err != nil {
			return nil, err
		}
		if len(offsets) != len(topics) || len(seqs) != len(topics) {
			return nil, errors.New("a task has not one position per topic")
		}
		last := len(s.Items) - 1
		if last < 0 || s.Items[last].Build != b.Build {
			last++
			first := b
			first.Skipped, first.Error, first.Position = 0, "", map[string]int64{}
			s.Items, places = append(s.Items, first), append(places, nil)
		}
		item := &s.Items[last]
		item.Skipped += b.Skipped
		if b.Error != "" {
			item.Error = fmt.Sprintf("partition %d: %s", partition, b.Error)
			if item.State == StateLive {
				item.State = StateHalted
			}
		}
		for i, topic := range topics {
			item.Position[topic] += seqs[i]
			places[last] = append(places[last], place{topic, partition, offsets[i]})
		}
	}
	for _, ps := range places {
		behind = append(behind, func(ends map[string]map[int32]int64) (lag int64) {
			for _, p := range ps {
				lag += max(0, ends[p.topic][p.partition]-p.offset)
			}
			return lag
		})
	}
	return behind, rows.Err()
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

func registerStatus(api huma.API, db DB, lags Lags) {
	huma.Register(api, huma.Operation{
		OperationID: "get-projections", Method: http.MethodGet, Path: "/projections",
		Summary: "How far read models and policies are", Tags: []string{"operation"},
	}, func(ctx context.Context, _ *struct{}) (*statusAnswer, error) {
		s, err := ReadStatus(ctx, db, lags)
		if err != nil {
			return nil, err
		}
		return &statusAnswer{etag(0), s}, nil
	})
}
