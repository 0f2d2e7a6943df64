package console

import (
	"fmt"
	"html/template"
	"math"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"
)

func parsePages() (map[string]*template.Template, error) {
	const layout = "layout.html"
	base, err := template.New(layout).Funcs(template.FuncMap{
		"stamp": stamp, "machine": machine, "bytes": bytesText, "count": count, "span": span, "cut": cut, "first": first,
	}).ParseFS(files, "templates/"+layout)
	if err != nil {
		return nil, err
	}
	entries, err := files.ReadDir("templates")
	if err != nil {
		return nil, err
	}
	pages := map[string]*template.Template{}
	for _, e := range entries {
		if e.Name() == layout {
			continue
		}
		t, err := base.Clone()
		if err == nil {
			t, err = t.ParseFS(files, path.Join("templates", e.Name()))
		}
		if err != nil {
			return nil, err
		}
		pages[strings.TrimSuffix(e.Name(), ".html")] = t
	}
	return pages, nil
}

// stamp is a time for people: always UTC, and says so.
func stamp(t time.Time) string {
	if t.IsZero() {
		return "not known"
	}
	return t.UTC().Format("2006-01-02 15:04:05 UTC")
}

// machine is a time for <time datetime>.
func machine(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// at is a time of the wire; the zero time where it has none.
func at(t *timestamppb.Timestamp) time.Time {
	if t.CheckValid() != nil {
		return time.Time{}
	}
	return t.AsTime()
}

var byteUnits = []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}

func bytesText(n uint64) string {
	v, unit := float64(n), 0
	for v >= 1024 && unit < len(byteUnits)-1 {
		v, unit = v/1024, unit+1
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, byteUnits[unit])
}

// count writes a number with its thousands apart.
func count(n any) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

// span is a duration in the two units that matter. What is left of a second counts as one: a path that is live has time left.
func span(d time.Duration) string {
	s := int64(math.Ceil(d.Seconds()))
	switch {
	case s <= 0:
		return "0 s"
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 3600 && s%60 == 0:
		return fmt.Sprintf("%d min", s/60)
	case s < 3600:
		return fmt.Sprintf("%d min %02d s", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%d h %02d min", s/3600, s/60%60)
	}
	return fmt.Sprintf("%d d %d h", s/86400, s/3600%24)
}

// ago is how long before now something was.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return span(max(now.Sub(t), time.Second)) + " ago"
}

// cut bounds a text in a list; the page of the thing itself has all of it.
func cut(most int, s string) string {
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	i := 0
	for range most {
		_, n := utf8.DecodeRuneInString(s[i:])
		i += n
	}
	return fmt.Sprintf("%s… (%s more)", s[:i], bytesText(uint64(len(s)-i)))
}

// first bounds a list within a list. What is left out is said.
func first(most int, all []string) []string {
	if len(all) <= most {
		return all
	}
	return append(slices.Clone(all[:most]), fmt.Sprintf("and %s more", count(len(all)-most)))
}
