package policy

import "time"

// lookAgain is how often a condition that looks at the time is asked again.
const lookAgain = time.Minute

// NextChange is when Authorise may answer otherwise than at now by the time alone: at the edges of the windows of access rules,
// at the ends of deny lists, and of what was signalled. Zero: never. A condition that looks at the time itself (now in When)
// is asked again every minute.
func (s *Set) NextChange(now time.Time) (next time.Time) {
	if s == nil {
		return time.Time{}
	}
	for _, l := range s.denials {
		if l.Spec.NotAfter.After(now) {
			next = earlier(next, l.Spec.NotAfter)
		}
	}
	for _, svc := range s.services {
		for i, r := range svc.Spec.Access {
			for _, w := range r.During {
				next = earlier(next, w.next(now))
			}
			if s.rules[svc.Name][i].now {
				next = earlier(next, now.Add(lookAgain))
			}
		}
	}
	if s.signals == nil {
		return next
	}
	for _, all := range s.signals.bySource {
		for _, said := range all {
			next = earlier(next, said.next(now))
		}
	}
	return next
}
