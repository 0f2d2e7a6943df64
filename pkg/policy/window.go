package policy

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	_ "time/tzdata" // a node may have no zones of its own
)

// Window is a time of the week. It is read in its time zone, with the hours that summer time takes and gives.
// +kubebuilder:validation:XValidation:rule="(has(self.from) ? self.from : '00:00') != (has(self.to) ? self.to : '00:00')",message="is none: write 00:00 and 24:00 for a whole day",fieldPath=".to"
type Window struct {
	// Days on which it begins: Mon to Sun. Empty: every day.
	// +kubebuilder:validation:MaxItems=32
	// +listType=atomic
	Days []Weekday `json:"days,omitempty" yaml:"days,omitempty"`
	// From and To are times of day, like 22:00. A To that is not after From is on the next day.
	// +optional
	// +kubebuilder:validation:XValidation:rule="self != '24:00'",message="a window cannot begin at the end of a day: write 00:00, and the day after"
	From TimeOfDay `json:"from" yaml:"from"`
	// +optional
	To TimeOfDay `json:"to" yaml:"to"`
	// Timezone is a name of the IANA database. Empty: UTC.
	// +kubebuilder:validation:MaxLength=64
	// +kubebuilder:validation:Pattern=`^([A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*)?$`
	// +kubebuilder:validation:XValidation:rule="self != 'Local'",message="is not a time zone: write a name like Europe/Berlin"
	Timezone string `json:"timezone,omitempty" yaml:"timezone,omitempty"`
}

// TimeOfDay is hours and minutes, as minutes after midnight; 24:00 is the end of a day.
// +kubebuilder:validation:MinLength=5
// +kubebuilder:validation:MaxLength=5
// +kubebuilder:validation:Pattern=`^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$`
type TimeOfDay uint16

const endOfDay TimeOfDay = 24 * 60

// String gives the form 22:00.
func (t TimeOfDay) String() string { return fmt.Sprintf("%02d:%02d", t/60, t%60) }

// MarshalText gives the form of String.
func (t TimeOfDay) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads the form of String.
func (t *TimeOfDay) UnmarshalText(text []byte) error {
	v, err := time.Parse("15:04", string(text))
	switch {
	case string(text) == endOfDay.String():
		*t = endOfDay
	case err != nil || v.Format("15:04") != string(text):
		return faultf("write hours and minutes, like 22:00", "%q is not a time of day", cut(string(text)))
	default:
		*t = TimeOfDay(v.Hour()*60 + v.Minute())
	}
	return nil
}

var weekdays = []string{"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}

func (w Window) validate(d *document, field string) {
	for i, day := range w.Days {
		if !slices.Contains(weekdays, day) {
			d.report(fmt.Sprintf("%s.days[%d]", field, i), faultf("write "+strings.Join(weekdays, ", "), "%q is not a day of the week", day))
		}
	}
	if w.From == endOfDay {
		d.report(field+".from", faultf("write 00:00, and the day after", "a window cannot begin at the end of a day"))
	}
	if w.From == w.To {
		d.report(field+".to", faultf("write 00:00 and 24:00 for a whole day", "a window from %s to %s is none", w.From, w.To))
	}
	if _, err := time.LoadLocation(w.Timezone); err != nil || w.Timezone == "Local" {
		d.report(field+".timezone", faultf("write a name like Europe/Berlin", "%q is not a time zone", w.Timezone))
	}
}

// String says it in words: "22:00 to 06:00 Europe/Berlin on Mon, Tue".
func (w Window) String() string {
	zone, days := w.Timezone, ""
	if zone == "" {
		zone = "UTC"
	}
	if len(w.Days) > 0 {
		days = " on " + strings.Join(w.Days, ", ")
	}
	return fmt.Sprintf("%s to %s %s%s", w.From, w.To, zone, days)
}

// until is the end of the window that now is in; ok says whether it is in one. The window must be valid.
func (w Window) until(now time.Time) (end time.Time, ok bool) {
	local, ok := w.local(now)
	if !ok {
		return time.Time{}, false // none that was validated
	}
	for _, daysAgo := range []int{0, 1} { // one that began yesterday may go on
		begin := w.From.on(local, -daysAgo)
		end := w.To.on(local, -daysAgo)
		if w.To <= w.From {
			end = w.To.on(local, 1-daysAgo)
		}
		if w.begins(begin.Weekday()) && !now.Before(begin) && now.Before(end) {
			return end.UTC(), true
		}
	}
	return time.Time{}, false
}

// zones has every time zone that a window was asked in: reading one takes a look at the disk.
var zones sync.Map

// local is now in the window's time zone.
func (w Window) local(now time.Time) (local time.Time, ok bool) {
	if zone, ok := zones.Load(w.Timezone); ok {
		return now.In(zone.(*time.Location)), true
	}
	zone, err := time.LoadLocation(w.Timezone)
	if err != nil {
		return time.Time{}, false
	}
	zones.Store(w.Timezone, zone)
	return now.In(zone), true
}

// next is the first time after now at which the window begins or ends.
func (w Window) next(now time.Time) time.Time {
	local, ok := w.local(now)
	if !ok {
		return time.Time{}
	}
	var next time.Time
	for day := -1; day <= 8; day++ { // one that began yesterday may end today, and the next may be a week away
		begin, end := w.From.on(local, day), w.To.on(local, day)
		if w.To <= w.From {
			end = w.To.on(local, day+1)
		}
		if !w.begins(begin.Weekday()) {
			continue
		}
		for _, t := range []time.Time{begin, end} {
			if t.After(now) {
				next = earlier(next, t)
			}
		}
	}
	return next.UTC()
}

func (w Window) begins(day time.Weekday) bool {
	return len(w.Days) == 0 || slices.Contains(w.Days, weekdays[day])
}

// on is the time of day on the day that many days after t's.
func (t TimeOfDay) on(day time.Time, after int) time.Time {
	return time.Date(day.Year(), day.Month(), day.Day()+after, int(t/60), int(t%60), 0, 0, day.Location())
}
